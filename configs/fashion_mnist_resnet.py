"""A residual network of eight layers, 95 % sparse, on Fashion-MNIST.

  python -m train.prepare fashion_mnist
  python -m train.main --config configs/fashion_mnist_resnet.py --workdir runs/fashion_mnist_resnet
  python -m train.main --config configs/fashion_mnist_resnet.py:macs --workdir runs/fashion_macs

After a colon may stand another backbone than `global`, which selects what is pruned:

- macs: a tenth of the multiply-accumulates. A weight costs what it multiplies: one of the first
  stage 784 products an image, one of the last 49. Weights go in the order of |w| until a tenth of
  the work is left, however many weights that is.
- n_m: the pattern 2:4. Of every four consecutive input channels of a kernel two are left, which
  sparse tensor cores take; the first convolution, with one input channel, stays dense. Other
  patterns: --config.backbone="{'name': 'n_m', 'n': 1, 'm': 4}" --config.sparsity=0.75.

A recipe of ours after the paper's: SGD with momentum 0.9, cosine, clipping at 3, crop and flip,
sparsity grown over the first half.

Aims at: no published figure; `python -m benchmarks.accuracy` makes ours, dense and at 90 to 99 %,
and `python -m benchmarks.backbones` those of the backbones, for 12 epochs.
Hardware: two CPU cores; not timed on its own. An estimate, at a sustained 20 GFLOP/s, is 3 min:
3 x 2,364,864 multiply-accumulates x 2 FLOP x 60,000 images x 4 epochs = 3.4e12 FLOP.
"""

import ml_collections

PRUNING = {
    "global": {"sparsity": 0.95},
    "macs": {"sparsity": 0.9, "backbone": {"name": "macs", "exponent": 0.0}},
    "n_m": {
        "sparsity": 0.5,
        "backbone": {"name": "n_m", "n": 2, "m": 4},
        "exclude": ("stem/kernel",),
    },
}


def get_config(backbone: str = "global") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.data = {"name": "fashion_mnist", "crop_padding": 2, "flip": True}
    config.model = {"name": "resnet8", "widths": (8, 16, 32)}

    config.batch_size = 128
    config.epochs = 4.0
    config.learning_rate = 0.1
    config.weight_decay = 5e-4

    config.update(PRUNING[backbone])

    config.log_every_steps = 100
    config.eval_every_epochs = 1.0
    return config
