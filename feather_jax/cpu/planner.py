"""From a graph to a plan: layouts, kernels, what moves between them, memory, weights."""

import dataclasses
import math

import numpy as np

from feather_jax.cpu import schedule
from feather_jax.cpu.arrange import (
    Arrangement,
    Need,
    arrange,
    is_product,
    needs,
    reduces_tiles,
    shared_moves,
)
from feather_jax.cpu.convolution import SparseConvolution
from feather_jax.cpu.dense import DenseProduct, SparseProduct, pack_product, pad_outputs
from feather_jax.cpu.drafts import Block, Draft, Operand, Weights, place_blocks
from feather_jax.cpu.graph import (
    Concatenate,
    Constant,
    Convolution,
    Elementwise,
    Graph,
    Input,
    Node,
    Pool,
    Reduce,
    Reshape,
)
from feather_jax.cpu.images import is_by_image, one_image
from feather_jax.cpu.layouts import Halo, Retile, ToRows, ToTiles, pixels, places
from feather_jax.cpu.pack import pack, taps
from feather_jax.cpu.plan import (
    Array,
    Copy,
    Kernel,
    Place,
    Plan,
    RowsKernel,
    Step,
    counter_bytes,
)
from feather_jax.cpu.target import Target
from feather_jax.cpu.tiled import TiledElementwise, TiledPool, TiledReduce
from feather_jax.cpu.tiles import NO_HALO, Tiles, mask_of
from feather_jax.cpu.transpose import RowsToTiles, TilesToRows, has_squares, tile_rows

# From this share of non-zeros on, a product with a vector takes the whole matrix.
DENSE_PRODUCT = 0.3


def make_plan(graph: Graph, target: Target, threads: int = 1) -> tuple[Plan, np.ndarray]:
    """Plans a graph's computation.

    Args:
      graph: simplified.
      target: the machine.
      threads: for how many to cut the work.

    Returns:
      The plan, and the weights that it refers to, uint8.
    """
    turns = 1
    if is_by_image(graph, target.lanes) and (images := one_image(graph)):
        graph, turns = images
    planner = _Planner(graph, target, threads, turns)
    for node in graph.nodes:
        planner.add(node)
    planner.finish()
    return planner.plan(), planner.weights.bytes()


class _Planner:
    def __init__(self, graph: Graph, target: Target, threads: int, turns: int):
        self.graph, self.target, self.threads, self.turns = graph, target, threads, turns
        self.weights = Weights()
        self._arrangement: Arrangement = arrange(graph, target.lanes)
        self._drafts: list[Draft] = []
        self._blocks: list[int] = []  # bytes of each
        self._rows: dict[Node, Operand] = {}
        self._tiled: dict[tuple[Node, Tiles], tuple[Operand, Tiles]] = {}
        self._parents = _parents(graph, self._arrangement)
        self._results = _results(graph)

    def add(self, node: Node) -> None:
        """Appends the steps that compute a node's result in its own layout."""
        made = self._arrangement.made
        match node.operation:
            case Input(index):
                self._rows[node] = Place("input", 0, index)
            case Constant(value):
                self._rows[node] = self.weights.add(value)
            case Reshape():
                self._rows[node] = self._in_rows(node.inputs[0])
            case Convolution() as op if is_product(op, node):
                self._product(node, op)
            case Convolution() as op:
                self._convolution(node, op)
            case Pool() as op if made[node]:
                self._pool(node, op)
            case Reduce() as op if reduces_tiles(node, made):
                x, tiles = self._input(node, 0)
                self._step(node, TiledReduce(tiles, op.kind), [self._new_rows(node), x])
            case Elementwise() as op if made[node]:
                self._elementwise(node, op)
            case Concatenate() if made[node]:
                self._concatenate(node)
            case operation:
                inputs = tuple(Array(each.shape, each.dtype) for each in node.inputs)
                operands = [self._in_rows(each) for each in node.inputs]
                self._rows_kernel(node, RowsKernel(operation, inputs), operands)

    def finish(self) -> None:
        """Appends what brings the results to where the caller wants them."""
        for index, node in enumerate(self.graph.outputs):
            source, target = self._in_rows(node), Place("output", 0, index)
            if source != target:
                nbytes = math.prod(node.shape) * node.dtype.itemsize
                self._step(node, Copy(nbytes), [target, source])

    def plan(self) -> Plan:
        """The steps with places."""
        places, size = place_blocks(self._drafts, self._blocks)
        shared = counter_bytes(self.threads, len(self._drafts) * self.turns)
        steps = tuple(
            Step(
                draft.layer,
                draft.kernel,
                tuple(
                    each
                    if isinstance(each, Place)
                    else Place("workspace", shared + places[each.number] + each.offset)
                    for each in draft.operands
                ),
                draft.node.shape,
                draft.nonzeros,
                draft.macs,
            )
            for draft in self._drafts
        )
        inputs, outputs = (
            tuple(self._all_turns(node) for node in nodes)
            for nodes in (self.graph.inputs, self.graph.outputs)
        )
        return Plan(inputs, outputs, steps, shared + size, self.threads, self.turns)

    def _all_turns(self, node: Node) -> Array:
        """An argument or result as the caller has it."""
        shape = node.shape
        return Array((self.turns * shape[0], *shape[1:]) if self.turns > 1 else shape, node.dtype)

    def _step(self, node: Node, kernel: Kernel, operands: list[Operand], **more) -> None:
        self._drafts.append(Draft(node.name, kernel, operands, node, **more))

    def _new(self, nbytes: int) -> Block:
        self._blocks.append(nbytes)
        return Block(len(self._blocks) - 1)

    def _new_rows(self, node: Node) -> Operand:
        """Where a node's result is to lie by rows."""
        if node in self._results:
            operand: Operand = Place("output", 0, self._results[node])
        else:
            operand = self._new(math.prod(node.shape) * node.dtype.itemsize)
        self._rows[node] = operand
        return operand

    def _new_tiled(self, node: Node) -> tuple[Operand, Tiles]:
        """Where a node's result is to lie in its own tiles: in a concatenation if it is part."""
        tiles = self._arrangement.versions[node][0]
        if (node, tiles) not in self._tiled:
            if node in self._parents:
                parent, channel = self._parents[node]
                base, whole = self._new_tiled(parent)
                assert isinstance(base, Block)
                operand = Block(base.number, base.offset + channel * whole.plane)
                pitched = dataclasses.replace(tiles, pitch=whole.pitch or whole.channels)
                self._tiled[node, tiles] = operand, pitched
            else:
                self._tiled[node, tiles] = self._new(tiles.nbytes), tiles
        return self._tiled[node, tiles]

    def _in_rows(self, node: Node) -> Operand:
        """A node's result by rows."""
        if node not in self._rows:
            x, tiles = self._new_tiled(node)
            kernel: Kernel = ToRows(tiles)
            table = pixels(tiles)
            if has_squares(tiles):
                kernel, table = TilesToRows(tiles), tile_rows(tiles)
            self._step(node, kernel, [self._new_rows(node), x, self.weights.add(table)])
        return self._rows[node]

    def _in_tiles(self, node: Node, need: Need) -> tuple[Operand, Tiles]:
        """A node's result in the tiles that a reader needs."""
        tiles = self._arrangement.version(node, need)
        if (node, tiles) not in self._tiled:
            made = self._arrangement.made[node]
            space = (tiles.batch, tiles.height, tiles.width, tiles.grid[0])
            if made and space == (made.batch, made.height, made.width, made.grid[0]):
                x, old = self._new_tiled(node)
                operand: Operand = self._new(tiles.nbytes)
                self._step(node, Retile(old, tiles), [operand, x])
            else:
                x, operand = self._in_rows(node), self._new(tiles.nbytes)
                if has_squares(tiles):
                    table = self.weights.add(tile_rows(tiles))
                    self._step(node, RowsToTiles(tiles), [operand, x, table])
                    self._fill_halo(node, operand, tiles)
                else:
                    table = self.weights.add(places(tiles))
                    self._step(node, ToTiles(tiles), [operand, x, table])
            self._tiled[node, tiles] = operand, tiles
        return self._tiled[node, tiles]

    def _input(self, node: Node, number: int) -> tuple[Operand, Tiles]:
        """An input in the tiles that a node's kernel needs."""
        need = needs(node, self._arrangement.made)[number]
        assert need is not None
        return self._in_tiles(node.inputs[number], need)

    def _mask(self, y: Tiles) -> Place:
        return Place("weights") if y.exact else self.weights.add(mask_of(y))

    def _fill_halo(self, node: Node, y: Operand, tiles: Tiles) -> None:
        if tiles.halo != NO_HALO:
            self._step(node, Halo(tiles), [y])

    def _bias(self, op: Convolution) -> np.ndarray:
        return np.zeros(op.weights.shape[3], np.float32) if op.bias is None else op.bias

    def _rows_kernel(self, node: Node, kernel: RowsKernel, operands: list[Operand]) -> None:
        """In place where each element of the result takes the place of the first input's."""
        alike = isinstance(kernel.operation, Elementwise) and kernel.inputs[0] == Array(
            node.shape, node.dtype
        )
        y = self._new_rows(node)
        self._step(node, kernel, [y, *operands], in_place=operands[0] if alike else None)

    def _product(self, node: Node, op: Convolution) -> None:
        """A product of a few vectors with a matrix."""
        x, *residual = (self._in_rows(each) for each in node.inputs)
        y = self._new_rows(node)
        matrix = op.weights[0, 0]
        inputs, outputs = matrix.shape
        batch, nonzeros = math.prod(node.shape[:3]), int(np.count_nonzero(matrix))
        common = (batch, inputs, outputs, bool(residual), op.activation)
        operands = [y, x, residual[0] if residual else y]
        kernel: Kernel
        if nonzeros > DENSE_PRODUCT * matrix.size:
            lanes = self.target.lanes
            kernel = DenseProduct(*common, lanes, nonzeros < matrix.size)
            weights = [pad_outputs(self._bias(op), lanes), pad_outputs(matrix, lanes)]
        else:
            kernel = SparseProduct(*common)
            weights = [self._bias(op), *pack_product(matrix)]
        operands += map(self.weights.add, weights)
        self._step(node, kernel, operands, nonzeros=nonzeros, macs=nonzeros * batch)

    def _convolution(self, node: Node, op: Convolution) -> None:
        x, x_tiles = self._input(node, 0)
        residual, residual_tiles = self._input(node, 1) if len(node.inputs) > 1 else (None, None)
        y, tiles = self._new_tiled(node)
        block, chunks = schedule.choose_block(op, x_tiles, tiles, self.target)
        panel = schedule.choose_panel(op, math.prod(block), self.target)
        packed = pack(op, x_tiles, chunks, panel)
        kernel = SparseConvolution(
            x_tiles,
            tiles,
            residual_tiles,
            op.strides,
            block,
            op.groups,
            chunks,
            panel,
            packed.has_lists(panel),
            schedule.prefetch(packed.length),
            packed.first,
            packed.bits,
            schedule.step(packed.length, packed.bits),
            taps(op, x_tiles),
            op.activation,
            by_channel=False,
        )
        if schedule.by_channel(math.prod(kernel.blocks), self.threads):
            kernel = dataclasses.replace(kernel, by_channel=True)
        lists = (packed.rows, packed.weights, packed.offsets)
        arrays = (self._bias(op), *lists, packed.panel_rows, packed.panels)
        weights = map(self.weights.add, arrays)
        operands = [y, x, residual or y, self._mask(tiles), *weights]
        nonzeros = int(np.count_nonzero(op.weights))
        macs = nonzeros * math.prod(node.shape[:3])
        self._step(node, kernel, operands, nonzeros=nonzeros, macs=macs, in_place=residual)
        self._fill_halo(node, y, tiles)

    def _pool(self, node: Node, op: Pool) -> None:
        x, x_tiles = self._input(node, 0)
        y, tiles = self._new_tiled(node)
        kernel = TiledPool(x_tiles, tiles, op.kind, op.window, op.strides, op.padding, op.dilation)
        self._step(node, kernel, [y, x, self._mask(tiles)])
        self._fill_halo(node, y, tiles)

    def _elementwise(self, node: Node, op: Elementwise) -> None:
        operands: list[Operand] = []
        layouts: list[Tiles | tuple[int, int]] = []
        for number, each in enumerate(node.inputs):
            if each.shape == node.shape:
                x, tiles = self._input(node, number)
                layouts.append(tiles)
            else:
                x, moves = self._in_rows(each), shared_moves(each.shape, node.shape)
                assert moves is not None
                layouts.append(moves)
            operands.append(x)
        y, tiles = self._new_tiled(node)
        alike = [x for x, own in zip(operands, layouts, strict=True) if own == tiles]
        kernel = TiledElementwise(tiles, tuple(layouts), op.steps)
        in_place = alike[0] if alike else None
        self._step(node, kernel, [y, self._mask(tiles), *operands], in_place=in_place)
        self._fill_halo(node, y, tiles)

    def _concatenate(self, node: Node) -> None:
        """Copies those inputs that do not lie in the result already."""
        y, tiles = self._new_tiled(node)
        channel = 0
        for number, each in enumerate(node.inputs):
            if self._parents.get(each) != (node, channel):
                x, own = self._input(node, number)
                assert isinstance(y, Block)
                part = Block(y.number, y.offset + channel * tiles.plane)
                layout = dataclasses.replace(
                    tiles, channels=each.shape[3], pitch=tiles.pitch or tiles.channels
                )
                kernel = TiledElementwise(layout, (own,), ())
                self._step(node, kernel, [part, self._mask(layout), x])
                self._fill_halo(node, part, layout)
            channel += each.shape[3]


def _parents(graph: Graph, arrangement: Arrangement) -> dict[Node, tuple[Node, int]]:
    """For the arrays that can be written straight into a concatenation: it, and the channel."""
    parents: dict[Node, tuple[Node, int]] = {}
    for node in graph.nodes:
        if not isinstance(node.operation, Concatenate) or not arrangement.made[node]:
            continue
        tiles, channel = arrangement.versions[node][0], 0
        for each in node.inputs:
            own = arrangement.versions[each][0]
            alike = dataclasses.replace(own, channels=tiles.channels) == tiles
            if alike and each not in parents:
                parents[each] = (node, channel)
            channel += each.shape[3]
    return parents


def _results(graph: Graph) -> dict[Node, int]:
    """The nodes whose rows are a result of the program as they are, and which."""
    results: dict[Node, int] = {}
    for index, node in enumerate(graph.outputs):
        source = node
        while isinstance(source.operation, Reshape):
            source = source.inputs[0]
        if not isinstance(source.operation, Input | Constant):
            results.setdefault(source, index)
    return results
