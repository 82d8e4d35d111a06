"""What the kernels are written with: LLVM's builder, with byte addresses, loops and vectors."""

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir as ir
import numpy as np

from feather_jax.cpu.target import Target

Value = Any  # LLVM's values, of whose types llvmlite tells nothing

F32, I1, I8 = ir.FloatType(), ir.IntType(1), ir.IntType(8)
I32, I64 = ir.IntType(32), ir.IntType(64)
POINTER, VOID = ir.PointerType(), ir.VoidType()


def i32(value: int) -> ir.Constant:
    return ir.Constant(I32, int(value))


def i64(value: int) -> ir.Constant:
    return ir.Constant(I64, int(value))


class Code:
    """A module in the making: functions by what determines them, so that none is there twice.

    Attributes:
      target: the machine.
      module: LLVM's.
    """

    def __init__(self, target: Target, name: str = "program"):
        self.target = target
        self.module = ir.Module(name)
        self.module.triple = target.triple
        self._functions: dict[Any, ir.Function] = {}

    def function(self, key: Any, emit: Callable[[], ir.Function]) -> ir.Function:
        """The function of `key`, which `emit` makes the first time."""
        if key not in self._functions:
            self._functions[key] = emit()
        return self._functions[key]

    def start(self, name: str, pointers: int, integers: int = 2) -> tuple["Builder", list[Value]]:
        """A new internal function void name(ptr ..., i64 ...): its builder and its arguments."""
        unique = f"{name}{len(self.module.functions)}"
        kind = ir.FunctionType(VOID, [POINTER] * pointers + [I64] * integers)
        function = ir.Function(self.module, kind, unique)
        function.linkage = "internal"
        function.attributes.add("noinline")
        function.attributes.add("nounwind")
        return Builder(self, function), list(function.args)

    def intrinsic(self, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> ir.Function:
        def declare() -> ir.Function:
            return ir.Function(self.module, ir.FunctionType(result, arguments), name)

        return self.function(name, declare)


class Builder(ir.IRBuilder):
    """LLVM's builder at the start of a function, with what kernels do again and again.

    Attributes:
      code: the module it writes to.
    """

    def __init__(self, code: Code, function: ir.Function):
        super().__init__(function.append_basic_block("entry"))
        self.code = code

    def address(self, pointer: Value, offset: Value | int) -> Value:
        """`offset` bytes behind a pointer."""
        if isinstance(offset, int):
            if offset == 0:
                return pointer
            offset = i64(offset)
        return self.gep(pointer, [offset], source_etype=I8)

    def read(
        self, pointer: Value, kind: ir.Type, offset: Value | int = 0, align: int | None = None
    ) -> Value:
        """The value of type `kind` that lies `offset` bytes behind a pointer, aligned to itself."""
        size = align or size_of(kind)
        return self.load(self.address(pointer, offset), typ=kind, align=size)

    def write(
        self, value: Value, pointer: Value, offset: Value | int = 0, align: int | None = None
    ) -> None:
        self.store(value, self.address(pointer, offset), align=align or size_of(value.type))

    def read_index(self, pointer: Value, offset: Value | int = 0) -> Value:
        """A 32-bit integer as a 64-bit one."""
        return self.sext(self.read(pointer, I32, offset), I64)

    def scale(self, value: Value, factor: int) -> Value:
        """`value` times a number."""
        return self.mul(value, ir.Constant(value.type, factor))

    def splat(self, value: Value, lanes: int) -> Value:
        """A vector of `lanes` times a scalar."""
        kind = ir.VectorType(value.type, lanes)
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.insert_element(undefined, value, i32(0))
        return self.shuffle_vector(first, undefined, lane_numbers([0] * lanes))

    def multiply_add(self, x: Value, y: Value, z: Value) -> Value:
        """x y + z, in one instruction where the target has one."""
        kind = x.type
        name = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        fma = self.code.intrinsic(f"llvm.fmuladd.{name}", kind, [kind] * 3)
        return self.call(fma, [x, y, z])

    def smaller_index(self, x: Value, y: Value) -> Value:
        """The smaller of two integers."""
        return self.select(self.icmp_signed("<", x, y), x, y)

    def larger_index(self, x: Value, y: Value) -> Value:
        """The larger of two integers."""
        return self.select(self.icmp_signed(">", x, y), x, y)

    def cover(self, value: Value, mask: Value, fill: float) -> Value:
        """`value` where the mask's bits are set and `fill` elsewhere."""
        bits = self.bitcast(value, mask.type)
        if fill == 0:
            return self.bitcast(self.and_(bits, mask), value.type)
        word = int(np.float32(fill).view(np.int32))
        filling = ir.Constant(mask.type, [word] * mask.type.count)
        outside = self.and_(self.not_(mask), filling)
        return self.bitcast(self.or_(self.and_(bits, mask), outside), value.type)

    def prefetch(self, pointer: Value) -> None:
        """Asks for the cache line that a pointer is in."""
        fetch = self.code.intrinsic("llvm.prefetch.p0", VOID, [POINTER, I32, I32, I32])
        self.call(fetch, [pointer, i32(0), i32(3), i32(1)])

    def loop(
        self,
        low: Value,
        high: Value,
        body: Callable[..., Sequence[Value] | None],
        carried: Sequence[Value] = (),
        step: int = 1,
    ) -> list[Value]:
        """for i in range(low, high, step): carried = body(i, *carried).

        Returns:
          What `carried` is behind the loop.
        """
        before = self.block
        head = self.append_basic_block("loop")
        behind = self.append_basic_block("behind")
        self.cbranch(self.icmp_signed("<", low, high), head, behind)

        self.position_at_end(head)
        index = self.phi(low.type)
        index.add_incoming(low, before)
        values = [self.phi(value.type) for value in carried]
        for phi, value in zip(values, carried, strict=True):
            phi.add_incoming(value, before)
        results = list(body(index, *values) or ())
        following = self.add(index, ir.Constant(low.type, step))
        last = self.block
        for phi, value in zip([index, *values], [following, *results], strict=True):
            phi.add_incoming(value, last)
        self.cbranch(self.icmp_signed("<", following, high), head, behind)

        self.position_at_end(behind)
        merged = []
        for value, result in zip(carried, results, strict=True):
            phi = self.phi(value.type)
            phi.add_incoming(value, before)
            phi.add_incoming(result, last)
            merged.append(phi)
        return merged

    def permute(self, x: Value, y: Value, lanes: Sequence[int] | np.ndarray) -> Value:
        """Lane i is the lane lanes[i] of x followed by y."""
        return self.shuffle_vector(x, y, lane_numbers(lanes))

    def larger(self, x: Value, y: Value) -> Value:
        """The larger of two, NaN if either is."""
        return self._extreme(">", x, y)

    def smaller(self, x: Value, y: Value) -> Value:
        """The smaller of two, NaN if either is."""
        return self._extreme("<", x, y)

    def _extreme(self, order: str, x: Value, y: Value) -> Value:
        chosen = self.select(self.fcmp_ordered(order, x, y), x, y)  # y if y is NaN
        return self.select(self.fcmp_unordered("uno", x, x), x, chosen)


def lane_numbers(lanes: Sequence[int] | np.ndarray) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, len(lanes)), [int(lane) for lane in lanes])


def size_of(kind: ir.Type) -> int:
    """Bytes."""
    if isinstance(kind, ir.VectorType):
        return kind.count * size_of(kind.element)
    if isinstance(kind, ir.PointerType):
        return 8
    return 4 if isinstance(kind, ir.FloatType) else kind.width // 8


def vector_of(lanes: int, kind: ir.Type = F32) -> ir.VectorType:
    return ir.VectorType(kind, lanes)


def float_vector(value: float, lanes: int) -> ir.Constant:
    """A constant vector of one number."""
    return ir.Constant(vector_of(lanes), [float(np.float32(value))] * lanes)
