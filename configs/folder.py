"""A folder of your own pictures, from scratch, 90 % sparse.

  python -m train.main --config configs/folder.py:resnet18 --config.data.path=DIR --workdir RUN
  python -m train.main --config configs/folder.py:resnet18,oxford_flowers102 --workdir RUN

DIR holds a subfolder of pictures for each class, or train/ and eval/ that do (docs/
your-own-pictures.md). The argument is the network and, in place of a folder, the name of an image
classification data set of TensorFlow Datasets (python -m train.prepare NAME):

- resnet18: photographs of 224x224, with torchvision's recipe for it (batch 256, learning rate 0.1,
  momentum 0.9, weight decay 1e-4, random resized crop and flip, 90 epochs), with a cosine in place
  of its steps, warm-up and label smoothing.
- resnet8: small pictures; of a folder grey ones of 28x28, unless --config.data.image_size says
  otherwise.

Aims at: no published figure; what a dense network reaches, within a point or two, with a tenth of
the weights. With few pictures a class, start from pretrained weights (configs/finetune.py).
Hardware: resnet18 one accelerator, not timed; resnet8 two CPU cores, see the walk for times.
"""

import ml_collections


def get_config(argument: str = "resnet18") -> ml_collections.ConfigDict:
    network, _, name = argument.partition(",")
    config = ml_collections.ConfigDict()
    config.data = {"name": name} if name else {"name": "folder", "path": "pictures"}
    config.data.flip = True
    config.model = {"name": network}
    config.sparsity = 0.9
    config.log_every_steps = 50

    if network == "resnet8":
        config.model.widths = (8, 16, 32)
        config.data.update(crop_padding=2, mean="computed", std="computed")
        if not name:
            config.data.update(image_size=28, grey=True)
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
