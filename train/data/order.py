"""Which examples make up which batch: a function of seed and step, with no state to save."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Int32


@functools.lru_cache(maxsize=2)  # a batch never spans two epochs, a prefetching reader may
def epoch_order(num_examples: int, seed: int, epoch: int) -> Int32[np.ndarray, " n"]:
    """A permutation of range(num_examples) that depends on nothing but the arguments.

    It sorts the raw output of a bit generator, whose stream NumPy guarantees from version to
    version (NEP 19), unlike that of `Generator.permutation`: a run resumed after an upgrade still
    sees each example once an epoch.
    """
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(num_examples)
    order = np.argsort(bits, kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order


@dataclasses.dataclass(frozen=True)
class Order:
    """The examples of every batch that one process reads.

    Update k, counted from 0, is trained on batch k % steps_per_epoch of epoch k // steps_per_epoch;
    the incomplete last batch of an epoch is dropped. Process p of P takes the positions [p B / P,
    (p + 1) B / P) of every global batch of B.

    Attributes:
      num_examples: the size of the data set.
      batch_size: B, of the global batch; a multiple of process_count.
      seed: what the shuffling is drawn from; non-negative. Evaluation is not shuffled.
      process_index: p, the number of this process.
      process_count: P, the number of processes.
    """

    num_examples: int
    batch_size: int
    seed: int = 0
    process_index: int = 0
    process_count: int = 1

    @property
    def local_batch_size(self) -> int:
        """b, examples in this process's slice of a batch."""
        return self.batch_size // self.process_count

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch of training."""
        return self.num_examples // self.batch_size

    @property
    def eval_steps(self) -> int:
        """Batches that hold every example once, the last one padded."""
        return -(-self.num_examples // self.batch_size)

    def positions(self) -> Int32[np.ndarray, " b"]:
        """The positions in the global batch that this process reads."""
        start = self.process_index * self.local_batch_size
        return np.arange(start, start + self.local_batch_size, dtype=np.int32)

    def train_examples(self, step: int) -> Int32[np.ndarray, " b"]:
        """The examples of update `step`, in the order of `positions`."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.num_examples, self.seed, epoch)
        return order[batch * self.batch_size + self.positions()]

    def eval_examples(self, batch: int) -> tuple[Int32[np.ndarray, " b"], Bool[np.ndarray, " b"]]:
        """The examples of an evaluation batch, and False where one is padding, the last
        repeated.
        """
        examples = batch * self.batch_size + self.positions()
        return np.minimum(examples, self.num_examples - 1), examples < self.num_examples
