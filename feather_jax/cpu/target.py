"""The machine that code is generated for."""

import dataclasses
import functools
import subprocess
import sys

import llvmlite.binding as llvm


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine, as LLVM names it.

    Attributes:
      triple: architecture, vendor, system; as in `x86_64-unknown-linux-gnu`.
      cpu: a processor that LLVM knows for it, as in `znver4` or `generic`.
      features: of the processor, as in `+avx2,+fma`; added to those that `cpu` implies.
      lanes: float32 lanes that the kernels treat as one vector.
      accumulators: how many of them a block of pixels has, at most.
      registers: how many of them there are.
    """

    triple: str
    cpu: str
    features: str
    lanes: int
    accumulators: int
    registers: int

    @property
    def x86(self) -> bool:
        return self.triple.startswith(_X86)

    def machine(self, jit: bool) -> llvm.TargetMachine:
        """LLVM's code generator for it: position-independent unless for this process."""
        initialize()
        return llvm.Target.from_triple(self.triple).create_target_machine(
            cpu=self.cpu,
            features=self.features,
            opt=3,
            reloc="default" if jit else "pic",
            codemodel="jitdefault" if jit else "default",
            jit=jit,
        )


_X86 = ("x86_64", "amd64", "i386", "i586", "i686")


@functools.cache
def initialize() -> None:
    """Makes all targets known to LLVM."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.initialize_native_asmparser()  # for the clock of an AArch64 host


@functools.cache
def host() -> Target:
    """This machine."""
    initialize()
    features = llvm.get_host_cpu_features()
    return _sized(
        llvm.get_process_triple(),
        llvm.get_host_cpu_name(),
        features.flatten(),
        avx512=features.get("avx512f", False),
        avx2=features.get("avx2", False) and features.get("fma", False),
    )


def _sized(triple: str, cpu: str, features: str, *, avx512: bool, avx2: bool) -> Target:
    """A vector is a register."""
    if avx512:
        return Target(triple, cpu, features, 16, 8, 32)
    if avx2:
        return Target(triple, cpu, features, 8, 10, 16)
    if triple.startswith(_X86):
        return Target(triple, cpu, features, 4, 10, 16)
    return Target(triple, cpu, features, 4, 20, 32)


def named(triple: str | None = None, cpu: str | None = None) -> Target:
    """The machine of a target triple and a processor's name; this one if neither is given.

    Raises:
      ValueError: LLVM knows no such target or processor, or one that the code is not for.
    """
    if triple is None and cpu is None:
        return host()
    initialize()
    triple = triple or llvm.get_process_triple()
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError as error:
        raise ValueError(
            f"LLVM knows no target {triple!r}; name one such as x86_64-linux-gnu or "
            f"aarch64-linux-gnu."
        ) from error
    cpu = cpu or ("x86-64" if triple.startswith("x86_64") else "generic")
    _check_processor(triple, cpu)
    probe = target.create_target_machine(cpu=cpu, features="")
    layout = str(probe.target_data)
    if layout.startswith("E") or "-p:16:" in layout:
        raise ValueError(
            "The code is for little-endian machines of 32 or 64 bits, and "
            f"{triple!r} is none; name another target."
        )
    enabled = _enabled(probe)
    return _sized(triple, cpu, "", avx512="avx512f" in enabled, avx2={"avx2", "fma"} <= enabled)


_PROBE = """
import sys
import llvmlite.binding as llvm
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
machine = llvm.Target.from_triple(sys.argv[1]).create_target_machine(cpu=sys.argv[2])
machine.emit_object(llvm.parse_assembly("define void @f() { ret void }"))
"""


@functools.cache
def _check_processor(triple: str, cpu: str) -> None:
    """Raises ValueError where LLVM does not know a processor: in a process of its own, as LLVM may
    end the one that asks."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, triple, cpu], capture_output=True, text=True
    )
    if done.returncode or "not a recognized processor" in done.stderr:
        raise ValueError(
            f"LLVM knows no processor {cpu!r} for {triple}; name one such as x86-64-v3, znver4 or "
            "cortex-a76."
        )


def _enabled(machine: llvm.TargetMachine) -> set[str]:
    """The features that a processor's name implies, of those that decide the width of a vector.

    LLVM tells by what it makes of a product: its registers' names are in the assembly.
    """
    found = set()
    for lanes, register, feature in ((16, "%zmm", "avx512f"), (8, "%ymm", "avx2")):
        vector = f"<{lanes} x float>"
        text = f"""
        target triple = "{machine.triple}"
        declare {vector} @llvm.fmuladd.v{lanes}f32({vector}, {vector}, {vector})
        define void @f(ptr %p) {{
          %x = load {vector}, ptr %p
          %y = call {vector} @llvm.fmuladd.v{lanes}f32({vector} %x, {vector} %x, {vector} %x)
          store {vector} %y, ptr %p
          ret void
        }}"""
        assembly = machine.emit_assembly(llvm.parse_assembly(text))
        if register in assembly and "vfmadd" in assembly:
            found |= {feature, "fma"}
    return found
