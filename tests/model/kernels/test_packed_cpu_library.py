"""Which library a CPU gets, and what is said when none fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.errors import ModelError
from model.kernels import packed_cpu_library
from model.kernels.packed_cpu_library import KernelLibrary, KernelLibraryError, cpu_level

V3 = "fpu avx avx2 fma f16c bmi2"
V4 = f"{V3} avx512f avx512bw avx512dq avx512vl avx512cd"


@pytest.mark.parametrize(("machine", "flags", "level"), [
    ("x86_64", V3, "x86_64_v3"), ("x86_64", V4, "x86_64_v4"), ("x86_64", f"{V3} avx512f", "x86_64_v3"),
    ("x86_64", "fpu avx", None), ("aarch64", "", "aarch64"), ("ppc64le", "", None)])
def test_cpu_gets_the_widest_level_that_it_has(machine: str, flags: str, level: str | None) -> None:
    assert cpu_level(machine, f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: none\n") == level


def test_every_level_was_built() -> None:
    folder = Path(packed_cpu_library.__file__).parent
    assert {path.name for path in folder.glob("*.so")} >= {
        f"packed_cpu.{level}.so" for level in ("x86_64_v3", "x86_64_v4", "aarch64")}


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
