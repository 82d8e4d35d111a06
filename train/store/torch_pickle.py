"""The pickle in a file of PyTorch: tensors, storages, containers and plain values, nothing else.

`pickle` calls whatever a file names. Here `pickletools` reads a pickle's instructions, and the few
of them that a state dict is made of are carried out on plain data: there is nothing that a file
could call, and nothing is imported.

References:
  CPython's `Lib/pickletools.py`, which documents each instruction.
  PyTorch's `torch/_utils.py`, `_rebuild_tensor_v2`, and `torch/serialization.py`, `persistent_id`:
  what tensors and storages are pickled as.
"""

import dataclasses
import pickletools
from typing import Any, BinaryIO

STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
"""PyTorch's types of storage, and what NumPy (with `ml_dtypes`) calls that of their elements."""

_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_KNOWN = {_ORDERED_DICT, _TENSOR, _PARAMETER, *STORAGES}

_VALUES = {
    "BINFLOAT", "BININT", "BININT1", "BININT2", "LONG1",
    "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE",
    "BINSTRING", "SHORT_BINSTRING",  # Python 2's
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PASSED_OVER = {"PROTO", "FRAME"}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A flat array that the file keeps outside of its pickle.

    Attributes:
      key: its name in the file.
      dtype: of its elements, a value of `STORAGES`.
      size: how many there are.
    """

    key: str
    dtype: str
    size: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage; nothing says yet that it lies within.

    Attributes:
      storage: what it is a view of.
      offset: of its first element, in elements.
      shape: its dimensions.
      strides: the distance of neighbours along each of them, in elements.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Global:
    """Something that the pickle names."""

    name: str


class Refused(Exception):
    """The pickle holds something else than a state dict: a name that is not known here."""


class Malformed(Exception):
    """This is no pickle that PyTorch wrote."""


def load(file: BinaryIO) -> Any:
    """Reads one pickle from where `file` stands, and leaves it behind its end.

    Returns:
      Dicts, lists and tuples of `Tensor` and plain values.

    Raises:
      Refused: it names anything but what PyTorch makes tensors of.
      Malformed: it is damaged.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise Malformed(str(error) or type(error).__name__) from error
    raise Malformed("it has no end")


class _Machine:
    """What pickle's instructions work on: a stack, the marks in it, and a memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carries out one instruction."""
        stack = self.stack
        match name:
            case _ if name in _PASSED_OVER:
                pass
            case _ if name in _VALUES:
                stack.append(argument)
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case _ if name in _TUPLES:
                stack.append(tuple(self.top(_TUPLES[name])))
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self.above_mark()))
            case "APPEND":
                self.extend(self.top(1))
            case "APPENDS":
                self.extend(self.above_mark())
            case "SETITEM":
                self.update(self.top(2))
            case "SETITEMS":
                self.update(self.above_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_known(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack.append(_known(".".join(self.top(2))))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                stack.append(_call(*self.top(2)))
            case "BUILD":  # the attributes of an OrderedDict: `_metadata`, of no use here
                of, _ = self.top(2)
                if not isinstance(of, dict):
                    raise Malformed("it sets attributes of something else than an OrderedDict")
                stack.append(of)
            case _:
                raise Malformed(f"it has the instruction {name}, which no state dict needs")

    def top(self, count: int) -> list[Any]:
        """Takes `count` items from the stack."""
        if count > len(self.stack) - (self.marks[-1] if self.marks else 0):
            raise Malformed("it takes more than there is")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def above_mark(self) -> list[Any]:
        """Takes what lies above the newest mark, and the mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise Malformed("it appends to something else than a list")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise Malformed("it gives items to something else than a dict")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _known(name: str) -> _Global:
    if name not in _KNOWN:
        raise Refused(name)
    return _Global(name)


def _storage(identity: Any) -> Storage:
    """What PyTorch writes in a storage's place: a kind, a type, a key, a device and a size."""
    kind, of, key, _, size, *view = identity
    proper = type(key) is str and type(size) is int and size >= 0
    if kind != "storage" or view not in ([], [None]) or not proper:
        raise Malformed("a storage in it is of a form that is not known")
    return Storage(key, STORAGES[of.name], size)


def _call(function: Any, arguments: Any) -> Any:
    """What the three functions of a state dict make of their arguments."""
    if function == _Global(_ORDERED_DICT):
        (pairs,) = arguments or ([],)  # Python 2 wrote the items here
        made = dict(pairs)
        pairs.clear()  # a small file cannot fill the memory with copies of one list
        return made
    if function == _Global(_TENSOR):
        storage, offset, shape, strides, *_ = arguments
        if not isinstance(storage, Storage):
            raise Malformed("a tensor in it has no storage")
        return Tensor(storage, offset, shape, strides)
    if function == _Global(_PARAMETER):
        return arguments[0]
    raise Malformed("it calls what is no function")
