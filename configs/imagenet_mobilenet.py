"""MobileNetV1, 90 % sparse, on ImageNet.

  python -m train.prepare imagenet2012 --manual_dir DIR      (DIR holds your ImageNet archives)
  python -m train.main --config configs/imagenet_mobilenet.py --workdir runs/imagenet_mobilenet

Feather's ImageNet recipe is not in its released code, so this is that of its closest published
neighbours: ST-3's (batch 512, learning rate 0.2, momentum 0.875, weight decay 5e-5, label smoothing
0.1, clipping at 3, 5 epochs of warm-up, cosine, 100 epochs, sparsity grown from epoch 5 to 50,
random resized crop and flip), which STR's resembles.

Aims at: no published figure of Feather's.
Hardware: eight accelerators, or a TPU pod slice; not timed yet. An estimate, at a sustained
40 TFLOP/s each and where reading keeps up, is 23 min: 3 x 568,740,352 multiply-accumulates x
2 FLOP x 1,281,167 images x 100 epochs = 4.4e17 FLOP.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.data = {"name": "imagenet2012", "flip": True, "image_size": 224, "workers": 8}
    config.model = {"name": "imagenet_mobilenet"}
    config.compute_dtype = "bfloat16"

    config.batch_size = 512
    config.epochs = 100.0
    config.warmup_epochs = 5.0
    config.learning_rate = 0.2
    config.momentum = 0.875
    config.weight_decay = 5e-5
    config.label_smoothing = 0.1
    config.clip_norm = 3.0

    config.sparsity = 0.9
    config.prune_begin = 5.0
    config.prune_end = 50.0

    config.log_every_steps = 100
    config.checkpoint_every_steps = 2500
    return config
