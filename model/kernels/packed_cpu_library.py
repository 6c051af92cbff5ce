"""The compiled kernels of this CPU, and what their C functions take.

Which library fits is known from the CPU's flags; all of them compute the same bits. Built by setup.py.
"""

from __future__ import annotations

import ctypes
import platform
from ctypes import c_float, c_long, c_void_p
from pathlib import Path

from model.errors import ModelError

_V3_FLAGS = {"avx2", "fma", "f16c", "bmi2"}
_V4_FLAGS = _V3_FLAGS | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}

_Functions = dict[str, list[type[c_void_p] | type[c_long] | type[c_float]]]

# Pointers and counts, as the C declarations have them. Short functions keep the GIL: giving it up costs more.
_SHORT_FUNCTIONS: _Functions = {
    "packed_rms_norm": [c_void_p, c_long, c_long, c_long, c_long, c_void_p, c_long, c_void_p, c_long, c_float, c_void_p,
                        c_long, c_long],
    "packed_times_sigmoid": [c_void_p, c_long, c_long, c_long, c_void_p, c_long, c_long, c_void_p, c_long, c_long],
    "packed_causal_conv": [c_void_p, c_long],
    "packed_rope": [c_void_p, c_long, c_long, c_long, c_long, c_void_p, c_void_p, c_void_p, c_long, c_long],
    "packed_combine": [c_void_p, c_long, c_void_p, c_void_p, c_long, c_long, c_long, c_void_p, c_long, c_long],
    "packed_write_kv": [c_void_p, c_void_p, c_long, c_void_p, c_long, c_void_p, c_long, c_long, c_long, c_long, c_long],
    "packed_panel_bytes": [c_long, c_long],
    "row_plan": [c_void_p, c_void_p, c_long, c_long, c_long, c_void_p, c_long, c_long, c_void_p],
}
_LONG_FUNCTIONS: _Functions = {
    "packed_pack": [c_void_p, c_void_p, c_long, c_long, c_long, c_long, c_long, c_long, c_long],
    "packed_linear": [c_void_p, c_void_p, c_long, c_long, c_void_p, c_void_p, c_long, c_long],
    "packed_experts": [c_void_p, c_void_p, c_long, c_long, c_void_p, c_void_p, c_long],
    "packed_attention": [c_void_p, c_long],
    "packed_gated_delta_rule": [c_void_p, c_long],
}
_RETURNS_LONG = {"packed_panel_bytes", "packed_experts", "packed_attention", "row_plan"}


class LinearStruct(ctypes.Structure):
    """`Linear` of packed_cpu.c"""

    _fields_ = [("panels", c_void_p), ("n", c_long), ("k", c_long), ("dtype", c_long)]


class ExpertsStruct(ctypes.Structure):
    """`Experts` of packed_cpu.c"""

    _fields_ = [("gate_up", c_void_p), ("down", c_void_p), ("num_experts", c_long), ("intermediate", c_long),
                ("hidden", c_long), ("dtype", c_long)]


class AttentionStruct(ctypes.Structure):
    """`Attention` of packed_attention.h"""

    _fields_ = [("q", c_void_p), ("cache", c_void_p), ("out", c_void_p), ("query_starts", c_void_p),
                ("context_lens", c_void_p), ("block_tables", c_void_p), ("q_step", c_long), ("num_seqs", c_long),
                ("table_width", c_long), ("num_heads", c_long), ("num_kv_heads", c_long), ("head_dim", c_long),
                ("block_size", c_long), ("dtype", c_long), ("sliding_window", c_long), ("scale", c_float)]


class SequencesStruct(ctypes.Structure):
    """`Sequences` of packed_delta_net.h"""

    _fields_ = [("query_starts", c_void_p), ("reads", c_void_p), ("writes", c_void_p),
                ("kept_starts", c_void_p), ("kept_rows", c_void_p), ("kept_slots", c_void_p), ("num_seqs", c_long)]


class ConvStruct(ctypes.Structure):
    """`ConvCall` of packed_delta_net.h"""

    _fields_ = [*((name, c_void_p) for name in ("x", "weight", "slots", "out")),
                *((name, c_long) for name in ("step", "width", "kernel", "dtype", "num_parts")),
                ("seqs", SequencesStruct)]


class DeltaStruct(ctypes.Structure):
    """`DeltaCall` of packed_delta_net.h"""

    _fields_ = [*((name, c_void_p) for name in ("qkv", "ba", "rate", "bias", "slots", "out")),
                *((name, c_long) for name in ("qkv_step", "ba_step", "num_key_heads", "num_heads", "key_dim",
                                              "value_dim", "dtype", "num_parts")), ("seqs", SequencesStruct)]


class CopiesStruct(ctypes.Structure):
    """`Copies` of row_split.h"""

    _fields_ = [*((name, c_void_p) for name in ("fixed", "holder", "read_F", "row_F", "start_F", "copied",
                                                "first_holder", "holders", "short_up_to", "splits_from", "read", "row",
                                                "start")),
                *((name, c_long) for name in ("num_members", "num_experts", "num_fixed", "num_copied"))]


class RoutingStruct(ctypes.Structure):
    """`Routing` of row_plan.h"""

    _fields_ = [("copies", c_void_p), ("holder_of", c_void_p), ("slot_of", c_void_p), ("rank", c_long),
                ("num_members", c_long), ("num_experts", c_long), ("num_slots", c_long)]


class KernelLibraryError(ModelError, OSError):
    """No compiled library for this CPU, or it does not load. TorchKernels runs anywhere."""


class KernelLibrary:
    """The loaded functions: `long` ones release the GIL while they run, `short` ones do not."""

    def __init__(self) -> None:
        path = library_path()
        if path is None:
            raise KernelLibraryError(f"no packed CPU kernels for {platform.machine()} with this CPU's instructions",
                                     fix="use TorchKernels, or a CPU with AVX2 and FMA, or an aarch64 one")
        if not path.exists():
            raise KernelLibraryError(f"{path} is not there", fix="build it: python setup.py build_generated")
        try:
            self.long = ctypes.CDLL(str(path))
            self.short = ctypes.PyDLL(str(path))
        except OSError as error:
            raise KernelLibraryError(f"{path} does not load: {error}",
                                     fix="build it here: python setup.py build_generated") from error
        _declare(self.long, _LONG_FUNCTIONS)
        _declare(self.short, _SHORT_FUNCTIONS)


def _declare(library: ctypes.CDLL, functions: _Functions) -> None:
    for name, argtypes in functions.items():
        function = getattr(library, name)
        function.argtypes = argtypes
        function.restype = c_long if name in _RETURNS_LONG else None


def library_path() -> Path | None:
    """The library for this CPU, whether or not it was built; None when no CPU level fits."""
    if platform.system() != "Linux":
        return None
    level = cpu_level(platform.machine(), Path("/proc/cpuinfo").read_text())
    return None if level is None else Path(__file__).with_name(f"packed_cpu.{level}.so")


def cpu_level(machine: str, cpuinfo: str) -> str | None:
    """Suffix of the library for a machine with this /proc/cpuinfo."""
    if machine == "aarch64":
        return "aarch64"
    if machine != "x86_64":
        return None
    flags = _cpu_flags(cpuinfo)
    if flags >= _V4_FLAGS:
        return "x86_64_v4"
    return "x86_64_v3" if flags >= _V3_FLAGS else None


def _cpu_flags(cpuinfo: str) -> set[str]:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return set(value.split())
    return set()
