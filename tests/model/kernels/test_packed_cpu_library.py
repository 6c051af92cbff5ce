"""A CPU gets the library that it can run, or is told that none fits."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy._core._multiarray_umath
import pytest

from model.errors import ModelError
from model.kernels import packed_cpu_library
from model.kernels.packed_cpu_library import KernelLibrary, KernelLibraryError, cpu_levels, library_path, struct_types

V3 = "fpu avx avx2 fma f16c bmi2"
V4 = f"{V3} avx512f avx512bw avx512dq avx512vl avx512cd"
LEVELS = ["x86_64_v4_bf16", "x86_64_v4", "x86_64_v3"]


@pytest.mark.parametrize(("machine", "flags", "levels"), [
    ("x86_64", V3, LEVELS[2:]), ("x86_64", V4, LEVELS[1:]), ("x86_64", f"{V4} avx512_bf16", LEVELS),
    ("x86_64", f"{V3} avx512f avx512_bf16", LEVELS[2:]), ("x86_64", "fpu avx", []), ("aarch64", "", ["aarch64"]),
    ("ppc64le", "", [])])
def test_cpu_gets_the_levels_that_it_has(machine: str, flags: str, levels: list[str]) -> None:
    assert cpu_levels(machine, f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: none\n") == levels


def test_dots_with_other_bits_are_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(packed_cpu_library, "cpu_levels", lambda machine, cpuinfo: LEVELS)
    monkeypatch.setattr(packed_cpu_library, "dots_are_chains", lambda path: "bf16" not in path.name)
    path = library_path()
    assert path is not None and path.name == "packed_cpu.x86_64_v4.so"
    assert "dot_kernels_refused" in caplog.text


def test_every_level_was_built() -> None:
    folder = Path(packed_cpu_library.__file__).parent
    assert {path.name for path in folder.glob("*.so")} >= {
        f"packed_cpu.{level}.so" for level in (*LEVELS, "aarch64")}


def test_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packed_cpu_library, "library_path", lambda: tmp_path / "absent.so")
    with pytest.raises(KernelLibraryError, match="setup.py build_generated"):
        KernelLibrary()
    (tmp_path / "absent.so").write_bytes(b"not a library")
    with pytest.raises(OSError, match="does not load"):
        KernelLibrary()


def test_unknown_cpu_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cpu_library, "library_path", lambda: None)
    with pytest.raises(ModelError, match="use TorchKernels"):
        KernelLibrary()


def test_structs_are_made_of_what_c_says_of_them() -> None:
    types = struct_types("Pair{const char * begin;long count;}One{float scale;}")
    assert [name for name in types] == ["Pair", "One"]
    pair = types["Pair"](begin=None, count=-7)
    assert (pair.begin, pair.count, ctypes.sizeof(types["Pair"]), ctypes.sizeof(types["One"])) == (None, -7, 16, 4)


def test_a_struct_takes_a_value_for_each_of_its_fields() -> None:
    library = KernelLibrary()
    linear = library.new_struct("Linear", panels=None, n=3, k=4, dtype=1)
    assert (linear.n, linear.k, linear.dtype) == (3, 4, 1) and library.new_struct("Linear").n == 0
    for name, values in (("Linear", {"n": 3}), ("Linear", {"panels": 0, "n": 3, "k": 4, "dtype": 1, "rows": 2}),
                         ("Absent", {})):
        with pytest.raises(KernelLibraryError, match="built from other sources.*setup.py build_generated"):
            library.new_struct(name, **values)


def test_a_library_of_other_sources_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    another = Path(numpy._core._multiarray_umath.__file__)
    monkeypatch.setattr(packed_cpu_library, "library_path", lambda: another)
    with pytest.raises(KernelLibraryError, match="built from other sources.*setup.py build_generated"):
        KernelLibrary()
