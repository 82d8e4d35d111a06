"""scikit-learn's handwritten digits: a real data set that comes in a wheel."""

import numpy as np

from train.data.memory import Arrays

NUM_TRAIN = 1_437


def load() -> Arrays:
    """The 1,797 digits (8 x 8, one channel), 1,437 for training and 360 for evaluation.

    The pixels' 17 levels are spread over 0..255, so that digits are normalised as any other data
    set is. The split is drawn once and for all, whatever the run's seed.
    """
    from sklearn.datasets import load_digits  # half a second that other data sets need not spend

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    shuffled = np.argsort(np.random.Philox(0).random_raw(len(labels)), kind="stable")
    train, evaluation = np.split(shuffled, [NUM_TRAIN])
    return Arrays(
        train_images=images[train],
        train_labels=labels[train],
        eval_images=images[evaluation],
        eval_labels=labels[evaluation],
        classes=tuple(str(name) for name in digits.target_names),
    )
