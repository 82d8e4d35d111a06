"""The paper's CIFAR recipe, 90 % sparse: ResNet-20, MobileNetV1 or DenseNet40-24-BC.

  python -m train.prepare cifar100
  python -m train.main --config configs/cifar.py:resnet20,cifar100 --workdir runs/cifar100_resnet20

After the colon stand the network (resnet20, mobilenet or densenet40) and the data set (cifar10 or
cifar100). Another --workdir and --config.sparsity=0.98 give another point.

The recipe is that of Feather's released code (Glentis Georgoulakis et al., BMVC 2023): SGD with
momentum 0.9, cosine from 0.1 without warm-up, weight decay 5e-4, batch 128, 160 epochs, clipping at
3, crop with a padding of 4 and flip, sparsity grown over the first half. Ours departs from it in
two points: the incomplete last batch of an epoch is dropped (390 updates an epoch, not 391), and
the learning rate does not lag the update by one.

Aims at: the paper's CIFAR-100 table (arXiv 2310.02448), not repeated here. For CIFAR-10 there is no
published figure; the recipe is the one for CIFAR-100.
Hardware: one GPU; not timed on one yet. An estimate, at a sustained 10 TFLOP/s, is 13 min for
resnet20, 4 min for mobilenet and 23 min for densenet40: 3 x 162, 46 or 288 million
multiply-accumulates x 2 FLOP x 50,000 images x 160 epochs = 7.8e15, 2.2e15 or 1.4e16 FLOP.
"""

import ml_collections


def get_config(names: str = "resnet20,cifar100") -> ml_collections.ConfigDict:
    model, data = names.split(",")

    config = ml_collections.ConfigDict()
    config.data = {"name": data, "crop_padding": 4, "flip": True}
    config.model = {"name": model}

    config.batch_size = 128
    config.epochs = 160.0
    config.learning_rate = 0.1
    config.momentum = 0.9
    config.weight_decay = 5e-4
    config.clip_norm = 3.0

    config.sparsity = 0.9
    return config
