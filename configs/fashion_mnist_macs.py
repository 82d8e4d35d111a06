"""A residual network of eight layers with a tenth of its multiply-accumulates, on Fashion-MNIST.

  python -m train.prepare fashion_mnist
  python -m train.main --config configs/fashion_mnist_macs.py --workdir runs/fashion_mnist_macs

The recipe of configs/fashion_mnist_resnet.py. A weight costs what it multiplies: one of the first
stage 784 products an image, one of the last 49. Weights go in the order of |w| until a tenth of the
work is left, however many weights that is.

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

    config.sparsity = 0.9
    config.backbone = {"name": "macs", "exponent": 0.0}

    config.log_every_steps = 100
    config.eval_every_epochs = 1.0
    return config
