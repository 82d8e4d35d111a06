"""A small residual network, 95 % sparse, on scikit-learn's handwritten digits.

  python -m train.main --config configs/digits.py --workdir runs/digits

The data set is in scikit-learn's wheel: 1,797 real digits of 8x8 pixels.

Aims at: 99 % accuracy; at least 97 %, and at least 98 % with --config.sparsity=0.
Hardware: two CPU cores, 17 s with compilation.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.data = {"name": "digits", "crop_padding": 1}
    config.model = {"name": "resnet8", "widths": (16, 32, 64)}

    config.batch_size = 64
    config.epochs = 40.0
    config.learning_rate = 0.1
    config.weight_decay = 5e-4

    config.sparsity = 0.95

    config.eval_every_epochs = 4.0
    return config
