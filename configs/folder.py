"""A folder of your own pictures, from scratch, 90 % sparse.

  python -m train.main --config configs/folder.py:resnet18 --config.data.path=DIR --workdir RUN

DIR holds a subfolder of pictures for each class, or train/ and eval/ that do (docs/
your-own-pictures.md). The argument is the network:

- resnet18: photographs of 224x224, with torchvision's recipe for it (batch 256, learning rate 0.1,
  momentum 0.9, weight decay 1e-4, random resized crop and flip, 90 epochs), with a cosine in place
  of its steps, warm-up and label smoothing.
- resnet8: small grey pictures, of 28x28 unless --config.data.image_size says otherwise.

Aims at: what a dense network reaches, within a point or two, with a tenth of the weights. With few
pictures a class, start from pretrained weights instead (configs/finetune.py).
Hardware: resnet18 one accelerator (not timed); resnet8 two CPU cores, see the walk for times.
"""

import ml_collections


def get_config(network: str = "resnet18") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.data = {"name": "folder", "path": "pictures", "flip": True, "workers": 0}
    config.model = {"name": network}
    config.sparsity = 0.9
    config.log_every_steps = 50

    if network == "resnet8":
        config.model.widths = (8, 16, 32)
        config.data.update(image_size=28, grey=True, mean="computed", std="computed")
        config.data.crop_padding = 2
        config.batch_size = 128
        config.epochs = 4.0
        config.learning_rate = 0.1
        config.weight_decay = 5e-4
        return config

    config.data.update(image_size=224, random_resized_crop=0.08, center_crop=0.875)
    config.compute_dtype = "bfloat16"
    config.batch_size = 256
    config.epochs = 90.0
    config.warmup_epochs = config.get_oneway_ref("epochs") / 18  # 5, and less of fewer epochs
    config.learning_rate = 0.1
    config.weight_decay = 1e-4
    config.label_smoothing = 0.1
    return config
