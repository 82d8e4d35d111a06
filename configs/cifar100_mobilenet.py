"""MobileNetV1, 90 % sparse, on CIFAR-100.

  python -m train.prepare cifar100
  python -m train.main --config configs/cifar100_mobilenet.py --workdir runs/cifar100_mobilenet

Another --workdir and --config.sparsity=0.98 give another point.

The recipe is that of Feather's released code (Glentis Georgoulakis et al., BMVC 2023): SGD with
momentum 0.9, cosine from 0.1 without warm-up, weight decay 5e-4, batch 128, 160 epochs, clipping at
3, crop with a padding of 4 and flip, sparsity grown over the first half. Ours departs from it in
two points: the incomplete last batch of an epoch is dropped (390 updates an epoch, not 391), and
the learning rate does not lag the update by one.

Aims at: MobileNetV1 in the paper's CIFAR-100 table (arXiv 2310.02448), not repeated here.
Hardware: one GPU; not timed on one yet. An estimate, at a sustained 10 TFLOP/s, is 4 min:
3 x 46,446,592 multiply-accumulates x 2 FLOP x 50,000 images x 160 epochs = 2.2e15 FLOP.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.data = {
        "name": "cifar100",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2023, 0.1994, 0.2010),
        "crop_padding": 4,
        "flip": True,
    }
    config.model = {"name": "mobilenet"}

    config.batch_size = 128
    config.epochs = 160.0
    config.learning_rate = 0.1
    config.momentum = 0.9
    config.weight_decay = 5e-4
    config.clip_norm = 3.0

    config.sparsity = 0.9
    return config
