"""What is left in a finished model: its layers, and its weights around the threshold."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

import feather_jax as feather
from train.models.calling import count_macs
from train.store.leaves import selected
from train.store.model_file import SavedModel

_RANGE = 3.0  # of the histograms, in thresholds
_BINS = 120


@dataclasses.dataclass(frozen=True)
class PrunableLayer:
    """One prunable layer of the finalised network, or all of them.

    Attributes:
      name: the layer's path, as in `stage1_block1/conv1`.
      shape: its kernel's.
      weights: how many it has.
      nonzero: how many are left.
      macs: multiply-accumulates for one image.
      sparse_macs: those that do not multiply a zero.
      threshold: the largest magnitude that is pruned, of a weight or of a block; 0 if none is.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    nonzero: int
    macs: int
    sparse_macs: int
    threshold: float

    @property
    def density(self) -> float:
        """The fraction of the weights that is left."""
        return self.nonzero / self.weights if self.weights else 1.0


def macs_of(model: SavedModel) -> feather.Macs:
    """The multiply-accumulates of the whole network for one image."""
    return count_macs(model.network, model.variables, model.image_shape)


def layers_of(
    model: SavedModel, prunable: PyTree[bool], macs: feather.Macs, thresholds: Mapping[str, float]
) -> list[PrunableLayer]:
    """The prunable layers in the order in which the network computes."""
    counts = feather.summarize(model.variables["params"], prunable=prunable)
    by_name: dict[str, list[Any]] = {}
    for product in macs.layers:
        by_name.setdefault(product.name, []).append(product)
    order = {name: position for position, name in enumerate(by_name)}
    return [
        PrunableLayer(
            name=layer.name.removesuffix("/kernel"),
            shape=layer.shape,
            weights=layer.weights,
            nonzero=layer.nonzero,
            macs=sum(product.macs for product in by_name.get(layer.name, ())),
            sparse_macs=sum(product.sparse_macs for product in by_name.get(layer.name, ())),
            threshold=thresholds[layer.name],
        )
        for layer in sorted(counts.layers, key=lambda layer: order.get(layer.name, len(order)))
        if layer.prunable
    ]


def total_of(layers: Sequence[PrunableLayer]) -> PrunableLayer:
    """All layers as one."""
    sums = {
        name: sum(getattr(layer, name) for layer in layers)
        for name in ("weights", "nonzero", "macs", "sparse_macs")
    }
    threshold = max(layer.threshold for layer in layers)
    return PrunableLayer(name="all", shape=(), threshold=threshold, **sums)


def thresholds_of(
    dense: PyTree, sparse: PyTree, magnitude: Callable[[Array], Array]
) -> dict[str, float]:
    """The largest magnitude that is pruned in each leaf, by its name; 0 where none is.

    Args:
      dense: the trained parameters.
      sparse: the finalised ones.
      magnitude: what was compared with the thresholds.
    """

    def largest_pruned(was: np.ndarray, now: np.ndarray) -> float:
        pruned = (now == 0) & (was != 0)
        if not pruned.any():
            return 0.0
        size = np.broadcast_to(magnitude(jnp.asarray(was)), was.shape)
        return float(np.max(size[pruned]))

    kept = feather.named_leaves(sparse)
    return {
        name: largest_pruned(np.asarray(leaf), np.asarray(kept[name]))
        for name, leaf in feather.named_leaves(dense).items()
    }


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How the weights lie around the threshold.

    Attributes:
      threshold: the largest magnitude that is pruned, which is T but for less than the distance to
        the next one.
      edges: of the bins, in units of T.
      dense: the trained weights in each bin.
      sparse: the non-zero ones of those that the network uses.
      weights: how many there are.
      pruned: how many of them are zeros to the network.
    """

    threshold: float
    edges: Float[np.ndarray, " bins+1"]
    dense: Int[np.ndarray, " bins"]
    sparse: Int[np.ndarray, " bins"]
    weights: int
    pruned: int


def histogram_of(dense: PyTree, sparse: PyTree, prunable: PyTree[bool]) -> Histogram | None:
    """Counts the weights around the threshold.

    Args:
      dense: the trained parameters.
      sparse: the finalised ones.
      prunable: which parameters may be pruned.

    Returns:
      The histogram; None if nothing is pruned.
    """
    dense_leaves, sparse_leaves = (
        [np.asarray(leaf) for leaf in selected(params, prunable)] for params in (dense, sparse)
    )
    threshold = max(
        float(np.max(np.abs(was), where=now == 0, initial=0))
        for was, now in zip(dense_leaves, sparse_leaves, strict=True)
    )
    if not threshold:
        return None
    edges = np.linspace(-_RANGE, _RANGE, _BINS + 1)

    def count(leaf: np.ndarray) -> np.ndarray:
        return np.histogram(leaf / np.float32(threshold), bins=edges)[0]

    return Histogram(
        threshold=threshold,
        edges=edges,
        dense=np.sum([count(leaf) for leaf in dense_leaves], axis=0),
        sparse=np.sum([count(leaf[leaf != 0]) for leaf in sparse_leaves], axis=0),
        weights=sum(leaf.size for leaf in sparse_leaves),
        pruned=sum(int(np.count_nonzero(leaf == 0)) for leaf in sparse_leaves),
    )
