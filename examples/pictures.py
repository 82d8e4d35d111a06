"""Writes a data set as a folder of PNG files, a subfolder a class, as anyone's own pictures are.

  python examples/pictures.py digits pictures/digits
  python examples/pictures.py fashion_mnist pictures/fashion

The digits are scikit-learn's, 1,797 of 8x8 pixels. Fashion-MNIST is that of Debian's package
dataset-fashion-mnist (`apt install dataset-fashion-mnist`), 70,000 of 28x28 pixels in train/ and
eval/.
"""

import argparse
import gzip
import pathlib
import sys

import numpy as np
from PIL import Image

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
CLOTHES = (  # by label
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)


def write(folder: pathlib.Path, images: np.ndarray, names: list[str]) -> None:
    """Writes images, uint8 [n, height, width], each into the folder of its class."""
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        path = folder / name / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def digits(folder: pathlib.Path) -> None:
    """scikit-learn's digits, not yet divided into training and evaluation."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    write(folder, images, [str(label) for label in data.target])


def fashion_mnist(folder: pathlib.Path) -> None:
    """Fashion-MNIST, divided as it comes."""
    if not DEBIAN.is_dir():
        sys.exit(f"There is no {DEBIAN}; install it with `apt install dataset-fashion-mnist`.")
    for split, prefix in (("train", "train"), ("eval", "t10k")):
        pixels = gzip.decompress((DEBIAN / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((DEBIAN / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
        images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)
        names = [CLOTHES[label] for label in labels[8:]]
        write(folder / split, images, names)


def main() -> None:
    """Writes one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["digits", "fashion_mnist"])
    parser.add_argument("folder", type=pathlib.Path)
    arguments = parser.parse_args()
    {"digits": digits, "fashion_mnist": fashion_mnist}[arguments.name](arguments.folder)


if __name__ == "__main__":
    main()
