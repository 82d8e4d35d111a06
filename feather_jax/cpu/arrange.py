"""Which arrays of a graph lie in lane tiles, in which, and who reads them in others."""

import dataclasses
import math

import numpy as np

from feather_jax.cpu.graph import (
    Concatenate,
    Convolution,
    Elementwise,
    Graph,
    Node,
    Padding,
    Pool,
    Reduce,
    Shape,
    Steps,
)
from feather_jax.cpu.tiles import NO_HALO, Tiles, choose_tiles

# A convolution of fewer pixels than this, by 1 x 1, is a product of vectors with a matrix.
FEW_PIXELS = 4

# A window's result keeps its input's tiles where they take no more than this over the best ones:
# about what moving the input into other tiles costs.
KEEP_TILES = 1.1


@dataclasses.dataclass(frozen=True)
class Need:
    """What a reader wants of an array in tiles.

    Attributes:
      tiles: the tiles, with the halo that is read and, where `fill` is not None, its filling.
      fill: what must lie outside the plane; None for no matter.
    """

    tiles: Tiles
    fill: float | None


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """The layouts of a graph's arrays.

    Attributes:
      made: the layout that a node's own kernel writes; None for rows.
      versions: the layouts in tiles that a node's readers use, the one that was made first.
    """

    made: dict[Node, Tiles | None]
    versions: dict[Node, tuple[Tiles, ...]]

    def version(self, node: Node, need: Need) -> Tiles:
        """The layout in which a reader finds an array."""
        return next(each for each in self.versions[node] if _serves(each, need))


def arrange(graph: Graph, lanes: int) -> Arrangement:
    """Chooses a layout for every array of a graph.

    Forward, every node whose kernel works on tiles gets them: its input's where they fit. Backward,
    the readers' needs of halos and fillings are put together, and a reader that needs other tiles
    gets a version of its own.

    Args:
      graph: simplified.
      lanes: float32 lanes of a vector.
    """
    made: dict[Node, Tiles | None] = {}
    for node in graph.nodes:
        made[node] = _tiles_of(node, made, lanes)

    wanted: dict[Node, list[Need]] = {node: [] for node in graph.nodes}
    versions: dict[Node, tuple[Tiles, ...]] = {}
    for node in reversed(graph.nodes):
        versions[node] = _merge(made[node], wanted[node])
        if made[node] is not None:
            made[node] = versions[node][0]
        for source, need in zip(node.inputs, needs(node, made), strict=True):
            if need is not None:
                wanted[source].append(need)
    return Arrangement(made, versions)


def _tiles_of(node: Node, made: dict[Node, Tiles | None], lanes: int) -> Tiles | None:
    """The tiles, without halo, of a node's result; None if its kernel works on rows."""
    if node.dtype != np.float32 or not math.prod(node.shape):
        return None
    first = made[node.inputs[0]] if node.inputs else None
    match node.operation:
        case Convolution() as op:
            if is_product(op, node):
                return None
            if is_pointwise(op) and 1 in node.shape[1:3]:
                batch, height, width, channels = node.shape
                return choose_tiles((1, batch * height * width, 1, channels), lanes)
            return _windowed(node, first, op.strides, lanes)
        case Pool(strides=strides):
            if first is None or _flat(first, node.inputs[0].shape):
                return None
            return _windowed(node, first, strides, lanes)
        case Elementwise() if len(node.shape) == 4:
            return _elementwise(node, made)
        case Concatenate(axis=3):
            inputs = [made[each] for each in node.inputs]
            if first is None or not all(each and each.same_tiles(first) for each in inputs):
                return None
            return dataclasses.replace(first, channels=node.shape[3])
        case _:
            return None


def is_pointwise(op: Convolution) -> bool:
    """Whether a convolution's pixels are independent: a product with a matrix."""
    alone = op.weights.shape[:2] == (1, 1) and op.groups == 1
    return alone and op.strides == (1, 1) and op.padding == NO_HALO


def is_product(op: Convolution, node: Node) -> bool:
    """Whether it is computed by rows, as the product of a few vectors with a matrix."""
    return is_pointwise(op) and math.prod(node.shape[:3]) < FEW_PIXELS


def _flat(tiles: Tiles, shape: Shape) -> bool:
    """Whether tiles hold an array's pixels as one column, whatever image and row they are of."""
    return (tiles.batch, tiles.height, tiles.width) != shape[:3]


def _windowed(node: Node, x: Tiles | None, strides: tuple[int, int], lanes: int) -> Tiles:
    """Tiles for the result of a convolution or pool: its input's, divided, where they will do."""
    batch, height, width, channels = node.shape
    source = node.inputs[0].shape
    high, wide = (
        max(out, -(-size // step))
        for out, size, step in zip((height, width), source[1:3], strides, strict=True)
    )
    images = math.gcd(batch, lanes)  # the largest power of two that divides it
    best = choose_tiles((batch, high, wide, channels), lanes, images)
    best = dataclasses.replace(best, height=height, width=width)
    if x is None or _flat(x, source) or any(np.mod(x.tile, strides)):
        return best
    tile = (x.tile[0] // strides[0], x.tile[1] // strides[1])
    kept = dataclasses.replace(best, grid=x.grid, tile=tile)
    covered = tile[0] * x.grid[1] >= high and tile[1] * x.grid[2] >= wide
    if covered and math.prod(tile) * kept.groups <= KEEP_TILES * math.prod(best.tile) * best.groups:
        return kept
    return best


def _elementwise(node: Node, made: dict[Node, Tiles | None]) -> Tiles | None:
    """The tiles of the first input that has any, if the others can be read beside it."""
    whole = [each for each in node.inputs if each.shape == node.shape]
    tiled = [tiles for each in whole if (tiles := made[each])]
    if not tiled or any(each.dtype != np.float32 for each in node.inputs):
        return None
    tiles = tiled[0]
    for each in node.inputs:
        if each.shape == node.shape:
            continue
        moves = shared_moves(each.shape, node.shape)
        if moves is None or (moves[0] and _flat(tiles, node.shape)):
            return None
    return dataclasses.replace(tiles, channels=node.shape[3], halo=NO_HALO)


def shared_moves(shape: Shape, result: Shape) -> tuple[int, int] | None:
    """How far a value that all pixels share moves from image to image, and channel to channel.

    None if `shape` has pixels of its own.
    """
    batch, height, width, channels = (1,) * (4 - len(shape)) + shape
    if (height, width) != (1, 1) or batch not in (1, result[0]) or channels not in (1, result[3]):
        return None
    return (channels if batch > 1 else 0), (1 if channels > 1 else 0)


def needs(node: Node, made: dict[Node, Tiles | None]) -> list[Need | None]:
    """What a node's kernel wants of each of its inputs; None for rows."""
    tiles = made[node]
    match node.operation:
        case Convolution() as op if tiles is not None:
            height, width = op.weights.shape[:2]
            pads = any(side > 0 for sides in op.padding for side in sides)
            x = _source(node, tiles, (height, width), op.strides, op.padding, op.dilation)
            residual = Need(dataclasses.replace(tiles, halo=NO_HALO, pitch=0), None)
            both: list[Need | None] = [Need(x, 0.0 if pads else None), residual]
            return both[: len(node.inputs)]
        case Pool(kind, window, strides, padding, dilation) if tiles is not None:
            x = _source(node, tiles, window, strides, padding, dilation)
            pads = any(side > 0 for sides in padding for side in sides)
            return [Need(x, neutral(kind, node.inputs[0]) if pads else None)]
        case Reduce(kind) if reduces_tiles(node, made):
            tiles = made[node.inputs[0]]
            assert tiles is not None
            x = dataclasses.replace(tiles, halo=NO_HALO)
            return [Need(x, None if x.exact else neutral(kind, node.inputs[0]))]
        case Elementwise() if tiles is not None:
            own = Need(dataclasses.replace(tiles, halo=NO_HALO, pitch=0), None)
            return [own if each.shape == node.shape else None for each in node.inputs]
        case Concatenate() if tiles is not None:
            return [
                Need(dataclasses.replace(tiles, channels=each.shape[3]), tiles.fill)
                for each in node.inputs
            ]
        case _:
            return [None] * len(node.inputs)


def reduces_tiles(node: Node, made: dict[Node, Tiles | None]) -> bool:
    """Whether a node reduces the height and width of an array in tiles."""
    match node.operation:
        case Reduce(kind, (1, 2)) if kind in ("sum", "max", "min"):
            x = made[node.inputs[0]]
            return x is not None and not _flat(x, node.inputs[0].shape)
        case _:
            return False


def neutral(kind: str, x: Node) -> float:
    """What may lie outside an array for a pool or reduction: 0 if the array is never negative."""
    if kind == "max":
        return 0.0 if never_negative(x) else -math.inf
    return math.inf if kind == "min" else 0.0


def never_negative(node: Node) -> bool:
    """Whether no element of an array can be below zero."""
    match node.operation:
        case Convolution(activation=steps) if steps:
            return _steps_never_negative(steps, [False])
        case Elementwise(steps):
            return _steps_never_negative(steps, [never_negative(each) for each in node.inputs])
        case Concatenate() | Pool(kind="max"):
            return all(map(never_negative, node.inputs))
        case _:
            return False


def _steps_never_negative(steps: Steps, arguments: list[bool]) -> bool:
    known = list(arguments)
    for step in steps:
        operands = [known[x] if isinstance(x, int) else x.value.item() >= 0 for x in step.operands]
        match step.function:
            case "maximum":
                known.append(any(operands))
            case "minimum" | "multiply" | "add":
                known.append(all(operands))
            case function:
                known.append(function in ("abs", "exp", "logistic", "sqrt"))
    return known[-1]


def _source(
    node: Node,
    y: Tiles,
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
) -> Tiles:
    """The tiles that windows read: `strides` times the result's, with the halo that they reach."""
    x = node.inputs[0]
    if _flat(y, node.shape):
        return dataclasses.replace(y, channels=x.shape[3], halo=NO_HALO, pitch=0, fill=0.0)
    (top, _), (left, _) = padding
    reach = [(taps - 1) * step for taps, step in zip(window, dilation, strict=True)]
    below = max(0, reach[0] - top - strides[0] + 1)
    right = max(0, reach[1] - left - strides[1] + 1)
    batch, height, width, channels = x.shape
    return Tiles(
        batch,
        height,
        width,
        channels,
        grid=y.grid,
        tile=(y.tile[0] * strides[0], y.tile[1] * strides[1]),
        halo=((max(0, top), below), (max(0, left), right)),
    )


def _serves(tiles: Tiles, need: Need) -> bool:
    """Whether a reader can use a layout."""
    sides = zip(tiles.halo, need.tiles.halo, strict=True)
    reaches = all(own[i] >= wanted[i] for own, wanted in sides for i in (0, 1))
    matters = need.fill is not None and need.fill != tiles.fill
    return tiles.same_tiles(need.tiles) and reaches and not matters


def _merge(made: Tiles | None, wanted: list[Need]) -> tuple[Tiles, ...]:
    """The fewest layouts that serve all readers, the made one first, with the widest halos."""
    merged: list[Need] = [Need(made, None)] if made else []
    for need in wanted:
        for i, own in enumerate(merged):
            alike = own.tiles.same_tiles(need.tiles)
            if alike and (own.fill is None or need.fill is None or own.fill == need.fill):
                halo = _widest(own.tiles.halo, need.tiles.halo)
                fill = need.fill if own.fill is None else own.fill
                merged[i] = Need(dataclasses.replace(own.tiles, halo=halo), fill)
                break
        else:
            merged.append(need)
    return tuple(dataclasses.replace(each.tiles, fill=each.fill or 0.0) for each in merged)


def _widest(x: Padding, y: Padding) -> Padding:
    rows, columns = (tuple(map(max, a, b)) for a, b in zip(x, y, strict=True))
    return ((rows[0], rows[1]), (columns[0], columns[1]))
