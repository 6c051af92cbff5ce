"""Measures what this machine gives at most: multiplications in registers, and reading memory. See peaks.c."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from model.kernels import packed_cpu

NUM_STEPS = 200_000
READ_BYTES = 512 << 20


class Peaks:
    """Runs on as many threads as the kernels; every call takes milliseconds."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads)
        self._library = _compiled()
        self._memory = torch.ones(READ_BYTES, dtype=torch.uint8)
        self.has_dots = bool(self._library.has_dots())
        self.num_fma = num_threads * NUM_STEPS * self._library.lanes_per_step()
        self.num_dot_products = 2 * self.num_fma
        self.num_bytes = READ_BYTES

    def multiply(self) -> None:
        self._on_all_threads(lambda thread: self._library.fma_steps(NUM_STEPS))

    def multiply_pairs(self) -> None:
        self._on_all_threads(lambda thread: self._library.dot_steps(NUM_STEPS))

    def read(self) -> None:
        share = READ_BYTES // self._num_threads
        self._on_all_threads(lambda thread: self._library.read_bytes(self._memory.data_ptr() + thread * share, share))

    def _on_all_threads(self, work: Callable[[int], object]) -> None:
        others = [self._pool.submit(work, thread) for thread in range(1, self._num_threads)]
        work(0)
        for other in others:
            other.result()


def _compiled() -> ctypes.CDLL:
    headers = Path(packed_cpu.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peaks.so"
        subprocess.run([sys.executable, "-m", "ziglang", "cc", "-mcpu=native", "-O3", "-std=c11", "-ffp-contract=off",
                        "-shared", "-fPIC", f"-I{headers}", "-o", str(path), str(Path(__file__).with_name("peaks.c"))],
                       check=True)
        library = ctypes.CDLL(str(path))
    for name in ("fma_steps", "dot_steps"):
        getattr(library, name).argtypes, getattr(library, name).restype = [ctypes.c_long], ctypes.c_float
    library.read_bytes.argtypes = [ctypes.c_void_p, ctypes.c_long]
    for name in ("read_bytes", "lanes_per_step", "has_dots"):
        getattr(library, name).restype = ctypes.c_long
    return library
