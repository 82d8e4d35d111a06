"""From a function that JAX can trace to a graph.

What depends on weights alone is left to JAX: those equations run once, as one jitted program, and
their results are the graph's constants. The other equations become nodes, by the rules of
`feather_jax.cpu.primitives`.
"""

import dataclasses
import functools
import os
import re
import sysconfig
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from feather_jax.cpu.equation import Equation, Unsupported, inside
from feather_jax.cpu.graph import Constant, Graph, Input, Node, constant
from feather_jax.cpu.primitives import RULES, choose, leading, stack


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A function as a graph, and how its arguments and results are packed.

    Attributes:
      graph: of the flat arguments and results. Half-precision floats are float32 in it, at its
        inputs and outputs too.
      arguments: the flat arguments' shapes and dtypes as the function is called.
      argument_tree: of the tuple of positional arguments.
      results: the flat results' shapes and dtypes as the function returns them.
      result_tree: of what it returns.
    """

    graph: Graph
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    argument_tree: Any
    results: tuple[jax.ShapeDtypeStruct, ...]
    result_tree: Any


def lower(fn: Callable[..., Any], *examples: Any) -> Lowered:
    """Traces `fn` for arguments of the examples' shapes and dtypes.

    Args:
      fn: a function that JAX can trace and that closes over its weights.
      *examples: its arguments, pytrees of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      A `Lowered`.

    Raises:
      NotImplementedError: what depends on the arguments uses a primitive, or a form of one, that
        the compiler does not know. The message names it, its layer and its source line.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*examples)
    leaves, argument_tree = jax.tree.flatten(examples)
    results, result_tree = jax.tree.flatten(shapes)
    arguments = tuple(  # float64 and int64 are that only with jax_enable_x64 in the traced function
        jax.ShapeDtypeStruct(aval.shape, getattr(leaf, "dtype", aval.dtype))
        for leaf, aval in zip(leaves, closed.in_avals, strict=True)
    )

    program = _Program()
    values = [_Value(aval) for aval in closed.in_avals]
    outputs = program.inline(closed, values, _Place())
    try:
        inputs = tuple(
            Node(Input(index, tuple(each.shape), inside(each.dtype)))
            for index, each in enumerate(closed.in_avals)
        )
        nodes = program.nodes(dict(zip(values, inputs, strict=True)), outputs)
        graph = Graph(inputs, tuple(map(_computable, nodes)))
    except Unsupported as reason:
        raise NotImplementedError(
            f"The compiler stops at an argument or result {reason}."
        ) from None
    return Lowered(graph, arguments, argument_tree, tuple(results), result_tree)


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """A value of the traced program: known if it depends on constants alone."""

    aval: Any
    known: bool = False


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an equation comes from, for names and messages: its layer and its source line."""

    layer: str = ""
    line: str = ""

    def within(self, eqn: JaxprEqn) -> "_Place":
        """The place of an equation of a jaxpr that was called here."""
        own = re.sub(r"\b\w+\(|\)", "", str(eqn.source_info.name_stack))  # vmap(layer)
        layer = "/".join(filter(None, (*self.layer.split("/"), *own.split("/"))))
        frames: list[Any] = getattr(eqn.source_info.traceback, "frames", [])
        for frame in frames:
            if not frame.file_name.startswith(_LIBRARIES):
                return _Place(layer, f"{frame.file_name}:{frame.line_num}")
        return _Place(layer, self.line)

    def __str__(self) -> str:
        layer = self.layer or "the traced function"
        return f"{layer} ({self.line})" if self.line else layer


# Where Python's packages are, JAX's at least: a user's own line is in none of these.
_LIBRARIES = (*{os.path.dirname(os.path.dirname(jax.__file__)), sysconfig.get_path("purelib")},)


@dataclasses.dataclass(frozen=True, eq=False)
class _Task:
    """What gives some values from others: arrays where they are known, nodes otherwise."""

    run: Callable[..., Sequence[Any]]
    operands: tuple[_Value, ...]
    results: tuple[_Value, ...]


@dataclasses.dataclass(frozen=True)
class _Program:
    """The equations of a function, calls inlined, known ones apart from those left to compile."""

    constants: dict[_Value, Any] = dataclasses.field(default_factory=dict)
    known: list[_Task] = dataclasses.field(default_factory=list)
    unknown: list[_Task] = dataclasses.field(default_factory=list)

    def inline(
        self, closed: ClosedJaxpr | Jaxpr, arguments: Sequence[_Value], place: _Place
    ) -> list[_Value]:
        """Appends the equations of a jaxpr; returns its results."""
        jaxpr = closed.jaxpr if isinstance(closed, ClosedJaxpr) else closed
        constants = closed.consts if isinstance(closed, ClosedJaxpr) else ()
        environment = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable, value in zip(jaxpr.constvars, constants, strict=True):
            environment[variable] = self._constant(variable.aval, value)

        def read(atom: Any) -> _Value:
            if isinstance(atom, Literal):
                return self._constant(atom.aval, atom.val)
            return environment[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            results = self._equation(eqn, operands, place.within(eqn))
            environment.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _constant(self, aval: Any, value: Any) -> _Value:
        result = _Value(aval, known=True)
        self.constants[result] = value
        return result

    def _equation(
        self, eqn: JaxprEqn, operands: Sequence[_Value], place: _Place
    ) -> Sequence[_Value]:
        kind, avals = eqn.primitive.name, [each.aval for each in eqn.outvars]
        if kind in _CALLS:
            return self.inline(eqn.params[_CALLS[kind]], operands, place)
        if all(operand.known for operand in operands):
            return self._task(functools.partial(_bind, eqn), operands, avals)
        if kind == "scan":
            return self._unroll(eqn, operands, place)
        if kind == "cond":
            return self._branch(eqn.params["branches"], operands[0], operands[1:], place)
        return self._task(functools.partial(_nodes, eqn, place), operands, avals)

    def _task(
        self, run: Callable[..., Sequence[Any]], operands: Sequence[_Value], avals: Sequence[Any]
    ) -> Sequence[_Value]:
        known = all(operand.known for operand in operands)
        results = tuple(_Value(aval, known) for aval in avals)
        (self.known if known else self.unknown).append(_Task(run, tuple(operands), results))
        return results

    def _branch(
        self, branches: Sequence[Any], which: _Value, operands: Sequence[_Value], place: _Place
    ) -> Sequence[_Value]:
        """The branch that is known, or all of them and a choice of the results."""
        if which.known:
            (index,) = self.fold([which]).values()
            return self.inline(branches[np.clip(int(index), 0, len(branches) - 1)], operands, place)
        results = [self.inline(branch, operands, place) for branch in branches]
        return [
            self._task(lambda *nodes: [choose(*nodes)], [which, *cases], [cases[0].aval])[0]
            for cases in zip(*results, strict=True)
        ]

    def _unroll(self, eqn: JaxprEqn, operands: Sequence[_Value], place: _Place) -> Sequence[_Value]:
        """A scan, turn after turn.

        Its operands are constants, carry and stacked inputs, its results carry and stacked outputs;
        the stacked ones have an axis more than in the body.
        """
        body, turns = eqn.params["jaxpr"], range(eqn.params["length"])

        def with_axis(outer: Sequence[Any], inner: Sequence[Any]) -> int:
            return sum(a.aval.ndim != b.ndim for a, b in zip(outer, inner, strict=True))

        stacked = with_axis(operands, body.in_avals)
        carried = len(eqn.outvars) - with_axis(eqn.outvars, body.out_avals)
        first = len(operands) - stacked - carried
        constants, carry = operands[:first], operands[first : first + carried]
        slices: dict[int, list[_Value]] = {}
        for turn in reversed(turns) if eqn.params["reverse"] else turns:
            own = [self._index(each, turn) for each in operands[first + carried :]]
            results = self.inline(body, [*constants, *carry, *own], place)
            carry, slices[turn] = results[:carried], results[carried:]
        columns = zip(*(slices[turn] for turn in turns), strict=True)
        outputs = zip(columns, eqn.outvars[carried:], strict=True)
        return [*carry, *(self._stack(column, each.aval) for column, each in outputs)]

    def _index(self, value: _Value, index: int) -> _Value:
        aval = jax.ShapeDtypeStruct(value.aval.shape[1:], value.aval.dtype)
        run = (lambda x: [x[index]]) if value.known else (lambda x: [leading(x, index)])
        return self._task(run, [value], [aval])[0]

    def _stack(self, values: Sequence[_Value], aval: Any) -> _Value:
        if all(each.known for each in values):
            return self._task(lambda *each: [jax.numpy.stack(each)], values, [aval])[0]
        return self._task(lambda *each: [stack(each)], values, [aval])[0]

    def nodes(self, inputs: dict[_Value, Node], outputs: Sequence[_Value]) -> list[Node]:
        """The nodes of `outputs`, given those of the arguments."""
        wanted = dict.fromkeys(each for task in self.unknown for each in task.operands)
        wanted |= dict.fromkeys(outputs)
        nodes = dict(inputs)
        for each, value in self.fold([each for each in wanted if each.known]).items():
            nodes[each] = constant(value)
        for task in self.unknown:
            results = task.run(*(nodes[each] for each in task.operands))
            nodes.update(zip(task.results, results, strict=True))
        return [nodes[each] for each in outputs]

    def fold(self, wanted: Sequence[_Value]) -> dict[_Value, np.ndarray]:
        """The values of `wanted`, which are known, by one program on the CPU."""
        computed = [each for each in wanted if each not in self.constants]
        tasks, reached = [], set(computed)
        for task in reversed(self.known):
            if not reached.isdisjoint(task.results):
                tasks.append(task)
                reached.update(task.operands)
        needed = [each for each in self.constants if each in reached]

        def run(constants: Sequence[Any]) -> list[Any]:
            values = dict(zip(needed, constants, strict=True))
            for task in reversed(tasks):
                results = task.run(*(values[each] for each in task.operands))
                values.update(zip(task.results, results, strict=True))
            return [values[each] for each in computed]

        values = {each: self.constants[each] for each in wanted if each in self.constants}
        if computed:
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                constants = [_on_cpu(self.constants[each]) for each in needed]
                results = jax.jit(run)(constants)
            values.update(zip(computed, results, strict=True))
        return {each: np.asarray(value, each.aval.dtype) for each, value in values.items()}


# Primitives that call a jaxpr on their operands, and the parameter that holds it.
_CALLS = {
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
}


def _on_cpu(value: Any) -> Any:
    """A constant off other devices; the keys of random numbers are no arrays of NumPy's."""
    if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.extended):
        return jax.device_put(value, jax.local_devices(backend="cpu")[0])
    return np.asarray(value)


def _bind(eqn: JaxprEqn, *operands: Any) -> Sequence[Any]:
    """An equation's results by JAX."""
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]


def _nodes(eqn: JaxprEqn, place: _Place, *operands: Node) -> Sequence[Node]:
    """An equation's results as nodes."""
    kind = eqn.primitive.name
    equation = Equation(eqn.params, tuple(each.aval for each in eqn.outvars), place.layer)
    try:
        if kind not in RULES:
            raise Unsupported("which it does not know")
        results = RULES[kind](equation, *map(_computable, operands))
    except Unsupported as reason:
        raise NotImplementedError(
            f"The compiler stops at the primitive {kind}, {reason}, in {place}."
        ) from None
    return results if isinstance(results, tuple) else (results,)


def _computable(node: Node) -> Node:
    """`node`, if it is a constant of half precision in float32."""
    dtype = inside(node.dtype)
    if isinstance(node.operation, Constant) and node.dtype != dtype:
        return constant(node.operation.value.astype(dtype), node.name)
    return node
