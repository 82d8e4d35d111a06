"""Prepares a data set with TFDS: python -m train.prepare fashion_mnist --data_dir ~/data"""

import functools
import importlib.util
import itertools
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification.mnist import FashionMNIST

from train import program
from train.data import tfds_facts
from train.data.known import KNOWN, Known
from train.data.prepared import Missing, Prepared, open_prepared
from train.errors import UserError, one_line

PREPARABLE = [name for name in KNOWN if name != "digits"]  # digits come with scikit-learn

ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")  # ImageNet's

# Debian's package dataset-fashion-mnist has the original four files, but compressed anew, so that
# they don't have the checksums that TFDS knows.
DEBIAN_FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")


def prepare(name: str, data_dir: str = "", manual_dir: str = "") -> Prepared:
    """Downloads a data set and writes it as ArrayRecord, unless it is there already.

    TFDS writes into a directory of another name and renames it at the end, so that what was
    interrupted is not taken for a data set.

    Args:
      name: one of `PREPARABLE`, or an image classification data set of TFDS's.
      data_dir: where to, "" for TFDS's default.
      manual_dir: where ImageNet's archives are, "" for `downloads/manual` in data_dir.

    Returns:
      The data set, opened.

    Raises:
      UserError: if the name is unknown or is no image classification data set; if TensorFlow,
        files that have to be downloaded by hand, the internet or disk space is missing; or if what
        is there is damaged.
    """
    known = _known(name, data_dir)
    try:
        return open_prepared(name, data_dir, known)
    except Missing:
        pass
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"Preparing {name} needs TensorFlow; install it with "
            "`pip install '.[prepare]'` in feather-jax's folder."
        )
    from_debian = name == "fashion_mnist" and DEBIAN_FASHION_MNIST.is_dir()
    builder_class = _DebianFashionMnist if from_debian else functools.partial(tfds.builder, name)
    builder = builder_class(
        data_dir=os.path.expanduser(data_dir) or None, file_format="array_record"
    )
    downloads = os.fspath(builder.data_dir_root / "downloads")
    manual_dir = os.path.expanduser(manual_dir) or os.path.join(downloads, "manual")
    if name == "imagenet2012":
        _check_archives(pathlib.Path(manual_dir))
    elif not from_debian:
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            _check_manual(name, builder.MANUAL_DOWNLOAD_INSTRUCTIONS, pathlib.Path(manual_dir))
        for url in itertools.islice(builder.url_infos or (), 1):
            _check_connection(name, url)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(
                    extract_dir=scratch if from_debian else None,
                    manual_dir=manual_dir,
                    try_download_gcs=False,
                )
            )
    except Exception as error:  # builders, TensorFlow and what reads the archives raise anything
        raise UserError(
            f"{name} could not be prepared ({one_line(error)}); mend that and start again."
        ) from error
    return open_prepared(name, data_dir, known)


def _known(name: str, data_dir: str) -> Known:
    if name in PREPARABLE:
        return KNOWN[name]
    found = tfds_facts.find(name, data_dir)
    if found is None:
        raise UserError(
            f"{name!r} can't be prepared; choose one of {', '.join(PREPARABLE)}, or another image "
            "classification data set of TensorFlow Datasets."
        )
    return found


class _DebianFashionMnist(FashionMNIST, skip_registration=True):  # type: ignore[call-arg]
    """TFDS's builder, so that the data set is the same, from the files of Debian's package."""

    name = "fashion_mnist"

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {
            split: self._generate_examples(
                number,
                dl_manager.extract(DEBIAN_FASHION_MNIST / f"{prefix}-images-idx3-ubyte.gz"),
                dl_manager.extract(DEBIAN_FASHION_MNIST / f"{prefix}-labels-idx1-ubyte.gz"),
            )
            for split, prefix, number in (("train", "train", 60_000), ("test", "t10k", 10_000))
        }


def _check_archives(folder: pathlib.Path) -> None:
    if missing := [name for name in ARCHIVES if not (folder / name).is_file()]:
        raise UserError(
            f"ImageNet's {' and '.join(missing)} can't be found in {folder}; download them from "
            "https://image-net.org/download-images, where you need an account, and give their "
            "directory with --manual_dir."
        )


def _check_manual(name: str, instructions: str, folder: pathlib.Path) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(
            f"{name} has files that you have to download, and {folder} has none: "
            f"{' '.join(instructions.split()).rstrip('.')}; then give their directory with "
            "--manual_dir."
        )


def _check_connection(name: str, url: str) -> None:
    """One quick look, as TFDS itself tries for minutes."""
    try:
        requests.head(url, timeout=30)
    except requests.RequestException as error:
        raise UserError(
            f"{name} can't be downloaded, as {url} can't be reached "
            f"({type(error).__name__}); connect to the internet, or prepare it on a machine that "
            "is and copy its data_dir."
        ) from error


def main(argv: Sequence[str]) -> None:
    """Prepares a data set and says where it is."""
    parser = program.ArgumentParser("train.prepare", description=__doc__)
    parser.add_argument("name", help=f"one of {', '.join(PREPARABLE)}, or another of TFDS's")
    parser.add_argument("--data_dir", default="", help="where to (default: TFDS's)")
    parser.add_argument(
        "--manual_dir",
        default="",
        help="where ImageNet's archives are (default: downloads/manual in data_dir)",
    )
    arguments = parser.parse_args(argv)
    prepared = prepare(arguments.name, arguments.data_dir, arguments.manual_dir)
    program.say(
        f"{arguments.name} is in {prepared.directory}: {len(prepared.train):,} training and "
        f"{len(prepared.evaluation):,} evaluation examples."
    )


if __name__ == "__main__":
    sys.exit(program.run(lambda: main(sys.argv[1:])))
