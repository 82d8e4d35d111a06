"""A residual network of eight layers in the pattern 2:4, on Fashion-MNIST.

  python -m train.prepare fashion_mnist
  python -m train.main --config configs/fashion_mnist_2_4.py --workdir runs/fashion_mnist_2_4

The recipe of configs/fashion_mnist_resnet.py. Of every four consecutive input channels of a kernel
two are left, which sparse tensor cores take; the first convolution, with one input channel, stays
dense. Other patterns: --config.backbone="{'name': 'n_m', 'n': 1, 'm': 4}" --config.sparsity=0.75.

Aims at: no published figure; `python -m benchmarks.backbones` makes ours, for 12 epochs.
Hardware: two CPU cores; not timed on its own. An estimate, at a sustained 20 GFLOP/s, is 3 min:
3 x 2,364,864 multiply-accumulates x 2 FLOP x 60,000 images x 4 epochs = 3.4e12 FLOP.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.data = {"name": "fashion_mnist", "crop_padding": 2, "flip": True}
    config.model = {"name": "resnet8", "widths": (8, 16, 32)}

    config.batch_size = 128
    config.epochs = 4.0
    config.learning_rate = 0.1
    config.weight_decay = 5e-4

    config.sparsity = 0.5
    config.backbone = {"name": "n_m", "n": 2, "m": 4}
    config.exclude = ("stem/kernel",)

    config.log_every_steps = 100
    config.eval_every_epochs = 1.0
    return config
