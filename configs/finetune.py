"""A pretrained network on your own pictures, with a tenth of its multiply-accumulates.

  python -m train.main --config configs/finetune.py:resnet50 --workdir runs/mine \\
      --config.data.path=pictures --config.init_from=resnet50.pth

The network is one of resnet18, resnet34, resnet50 and mobilenet_v2. `pictures` has a subfolder a
class, and `resnet50.pth` the weights of torchvision's or timm's network of this name (see
docs/networks.md); a workdir or a model.npz of a run will do as well.

Learning rate 0.01, momentum 0.9 and weight decay 1e-4 are what ResNets are customarily fine-tuned
with (Li et al., Rethinking the Hyperparameters for Fine-tuning, 2020, arXiv 2002.11770, who find
that the best learning rate depends on the data: try a third and three times as much). The short
warm-up and the new head's ten-fold learning rate are customary too. Sparsity grows over the first
half, as in Feather's released code, and is a fraction of the multiply-accumulates (docs/
backbones.md). What is evaluated is the average of the weights.

Aims at: an accuracy within a point of the dense network's (--config.sparsity=0). Not measured:
published weights cannot be had where this was written.
Hardware: one GPU; not timed. An estimate for resnet50 and 10,000 pictures, at a sustained
10 TFLOP/s, is 8 min: 3 x 4.1e9 multiply-accumulates x 2 FLOP x 10,000 images x 20 epochs =
4.9e15 FLOP.
"""

import ml_collections


def get_config(name: str = "resnet50") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.data = {
        "name": "folder",
        "path": "pictures",
        "image_size": 224,
        "random_resized_crop": 0.25,
        "center_crop": 0.875,
        "flip": True,
        "workers": 4,
    }
    config.model = {"name": name}
    config.init_from = f"{name}.pth"

    config.batch_size = 64
    config.epochs = 20.0
    config.warmup_epochs = config.get_oneway_ref("epochs") * 0.05
    config.learning_rate = 0.01
    config.head_learning_rate = 10.0
    config.momentum = 0.9
    config.weight_decay = 1e-4
    config.label_smoothing = 0.1
    config.average_decay = 0.999

    config.sparsity = 0.9
    config.backbone = {"name": "macs"}
    return config
