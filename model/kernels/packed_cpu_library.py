"""Loads the compiled kernels of this CPU, and says what their C functions take.

Which libraries fit is known from the CPU's flags; all of them compute the same bits. The one that uses the CPU's bf16
dots is taken only where these are found to do so. Built by setup.py. The structs that C and Python share are described
by the library itself: shared_structs.h.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import re
from ctypes import c_float, c_long, c_void_p
from pathlib import Path

from model.errors import ModelError

logger = logging.getLogger(__name__)

_V3_FLAGS = {"avx2", "fma", "f16c", "bmi2"}
_V4_FLAGS = _V3_FLAGS | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
_LEVELS = {"x86_64_v4_bf16": _V4_FLAGS | {"avx512_bf16"}, "x86_64_v4": _V4_FLAGS, "x86_64_v3": _V3_FLAGS}  # best first

_CType = type[c_void_p] | type[c_long] | type[c_float]
_Functions = dict[str, list[_CType]]
_NUMBERS: dict[str, _CType] = {"long": c_long, "float": c_float}
_BUILD = "build it here: python setup.py build_generated"

# Pointers and counts, as the C declarations have them. Short functions keep the GIL: giving it up costs more.
_SHORT_FUNCTIONS: _Functions = {
    "packed_rms_norm": [c_void_p, c_long, c_long, c_long, c_long, c_void_p, c_long, c_void_p, c_long, c_float, c_void_p,
                        c_long, c_long],
    "packed_add_rms_norm": [c_void_p, c_void_p, c_long, c_long, c_void_p, c_long, c_float, c_void_p, c_long, c_long],
    "packed_times_sigmoid": [c_void_p, c_long, c_long, c_long, c_void_p, c_long, c_long, c_void_p, c_long, c_long],
    "packed_causal_conv": [c_void_p, c_long],
    "packed_rope": [c_void_p, c_long, c_long, c_long, c_long, c_long, c_void_p, c_void_p, c_void_p, c_long, c_long],
    "packed_combine": [c_void_p, c_long, c_void_p, c_void_p, c_long, c_long, c_long, c_void_p, c_long, c_long],
    "packed_write_kv": [c_void_p, c_void_p, c_long, c_void_p, c_long, c_void_p, c_long, c_long, c_long, c_long, c_long],
    "packed_weight_bytes": [c_long, c_long, c_long],
    "row_plan_offsets": [c_void_p, c_long, c_long, c_long, c_void_p],
    "row_plan": [c_void_p, c_void_p, c_long, c_long, c_long, c_void_p, c_long, c_long, c_void_p],
}
_LONG_FUNCTIONS: _Functions = {
    "packed_pack": [c_void_p, c_void_p, c_long, c_long, c_long, c_long, c_long, c_long, c_long],
    "packed_linear": [c_void_p, c_void_p, c_long, c_long, c_void_p, c_void_p, c_long, c_long],
    "packed_experts": [c_void_p, c_void_p, c_long, c_long, c_void_p, c_void_p, c_long],
    "packed_attention": [c_void_p, c_long],
    "packed_choose_experts": [c_void_p, c_void_p, c_long, c_long, c_long, c_long, c_long, c_void_p, c_void_p, c_long],
    "packed_local_experts": [c_void_p, c_void_p, c_long, c_long, c_long, c_void_p, c_void_p, c_void_p, c_void_p,
                             c_long],
    "packed_gathered_experts": [c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long, c_void_p, c_void_p, c_void_p,
                                c_void_p, c_long],
    "packed_add_shared_expert": [c_void_p, c_void_p, c_void_p, c_long, c_long, c_void_p, c_long],
    "packed_delta_net_block": [c_void_p, c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_void_p, c_long],
    "packed_attention_block": [c_void_p, c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_long],
    "packed_gated_delta_rule": [c_void_p, c_long],
}
_RETURNS_LONG = {"packed_weight_bytes", "packed_experts", "packed_attention", "row_plan",
                 "packed_choose_experts", "packed_local_experts", "packed_attention_block", "packed_gathered_experts",
                 "packed_add_shared_expert", "packed_delta_net_block"}


class KernelLibraryError(ModelError, OSError):
    """There is no compiled library for this CPU, or it does not load. TorchKernels runs anywhere."""


class KernelLibrary:
    """Holds the loaded functions: `long` ones release the GIL while they run, `short` ones do not."""

    def __init__(self) -> None:
        path = library_path()
        if path is None:
            raise KernelLibraryError(f"no packed CPU kernels for {platform.machine()} with this CPU's instructions",
                                     fix="use TorchKernels, or a CPU with AVX2 and FMA, or an aarch64 one")
        if not path.exists():
            raise KernelLibraryError(f"{path} is not there", fix=_BUILD)
        try:
            self.long = ctypes.CDLL(str(path))
            self.short = ctypes.PyDLL(str(path))
        except OSError as error:
            raise KernelLibraryError(f"{path} does not load: {error}", fix=_BUILD) from error
        try:
            _declare(self.long, _LONG_FUNCTIONS)
            _declare(self.short, _SHORT_FUNCTIONS)
            self._structs = struct_types(_description(self.short))
        except AttributeError as error:
            raise KernelLibraryError(f"{path} was built from other sources: {error}", fix=_BUILD) from error

    def new_struct(self, name: str, **values: float | None) -> ctypes.Structure:
        """Return a struct of shared_structs.h's kind with a value for each of its fields; without values, all are 0."""
        struct_type = self._structs.get(name)
        if struct_type is None or (values and values.keys() != struct_type.field_names):
            raise KernelLibraryError(f"the library was built from other sources: its struct {name} has other fields "
                                     f"than {', '.join(values)}", fix=_BUILD)
        return struct_type(**values)


class _Struct(ctypes.Structure):
    field_names: frozenset[str]


def struct_types(description: str) -> dict[str, type[_Struct]]:
    """Return the structs that are described so: `Name{type field;type field;}Name{...}`. Types as C writes them."""
    types: dict[str, type[_Struct]] = {}
    for name, fields in re.findall(r"(\w+)\{([^}]*)\}", description):
        declared = [field.rsplit(" ", 1) for field in fields.split(";")[:-1]]
        types[name] = type(name, (_Struct,), {
            "_fields_": [(field, _ctype(c_type)) for c_type, field in declared],
            "field_names": frozenset(field for _, field in declared)})
    return types


def _ctype(c_type: str) -> _CType:
    return c_void_p if c_type.endswith("*") else _NUMBERS[c_type]


def _description(library: ctypes.PyDLL) -> str:
    describe = library.shared_structs
    describe.argtypes, describe.restype = [], ctypes.c_char_p
    described: bytes = describe()
    return described.decode()


def _declare(library: ctypes.CDLL, functions: _Functions) -> None:
    for name, argtypes in functions.items():
        function = getattr(library, name)
        function.argtypes = argtypes
        function.restype = c_long if name in _RETURNS_LONG else None


def library_path() -> Path | None:
    """Return the library for this CPU, whether or not it was built; None when no CPU level fits."""
    if platform.system() != "Linux":
        return None
    for level in cpu_levels(platform.machine(), Path("/proc/cpuinfo").read_text(encoding="utf-8")):
        path = Path(__file__).with_name(f"packed_cpu.{level}.so")
        if dots_are_chains(path):
            return path
        logger.warning("dot_kernels_refused path=%s why=this CPU's bf16 dots give other bits than its FMA", path)
    return None


def cpu_levels(machine: str, cpuinfo: str) -> list[str]:
    """Return the suffixes of the libraries that a machine with this /proc/cpuinfo can run, the fastest first."""
    if machine == "aarch64":
        return ["aarch64"]
    flags = _cpu_flags(cpuinfo) if machine == "x86_64" else set()
    return [level for level, needed in _LEVELS.items() if flags >= needed]


def dots_are_chains(path: Path) -> bool:
    """Return whether the library's bf16 dots have the bits of its FMA chain here: packed_dots.h. True without dots, and
    for a library that does not load, of which KernelLibrary tells."""
    try:
        return bool(ctypes.PyDLL(str(path)).packed_dots_are_chains())
    except (OSError, AttributeError):
        return True


def _cpu_flags(cpuinfo: str) -> set[str]:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return set(value.split())
    return set()
