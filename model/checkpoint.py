"""Reads a Hugging Face folder of safetensors files by byte ranges, and counts what it reads.

The header is parsed here (8 bytes of length, then JSON; https://huggingface.co/docs/safetensors) because the library
maps whole files, which would count as resident memory of this process, and does not tell byte ranges.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from model.checkpoint_files import abbreviated, weight_file_names
from model.errors import CheckpointError, TensorError
from model.json_file import FETCH_AGAIN, parse_json_object, shown

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
_MAX_HEADER_BYTES = 100_000_000     # the format's own limit
_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
               "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Says where one tensor lies. `start` and `end` are byte offsets in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Checkpoint:
    """Knows the tensors of a folder and reads their bytes. Opens files lazily; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Read all headers. Raises CheckpointError for a folder or header that is none, TensorError for cut files."""
        self.folder = Path(folder)
        self.tensors: dict[str, StoredTensor] = {}
        self.bytes_read = 0
        self._descriptors: dict[Path, int] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)
        for file in _weight_files(self.folder):
            self.tensors.update(_read_header(file))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def read(self, name: str, first: int | None = None) -> Tensor:
        """Return the whole tensor, or with `first` only entry `first` of its first dimension, in the stored dtype.

        The tensor lies in a buffer that the next read uses again: copy what must last. Raises TensorError when the
        file ends early or the dtype is none of ours.
        """
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise TensorError(f"{name} has dtype {stored.dtype}, which is not implemented",
                              fix=f"serve a checkpoint in {', '.join(DTYPES)}")
        shape, start, num_bytes = stored.shape, stored.start, stored.end - stored.start
        if first is not None:
            shape, num_bytes = stored.shape[1:], num_bytes // stored.shape[0]
            start += first * num_bytes
        self._read_bytes(name, stored.file, start, num_bytes)
        return self._buffer[:num_bytes].view(DTYPES[stored.dtype]).view(shape)

    def _read_bytes(self, name: str, file: Path, start: int, num_bytes: int) -> None:
        if self._buffer.numel() < num_bytes:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        if file not in self._descriptors:
            try:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise TensorError(f"{file.name} cannot be read: {error}", fix=FETCH_AGAIN) from error
        target, done = memoryview(self._buffer.numpy().data), 0
        while done < num_bytes:
            count = os.preadv(self._descriptors[file], [target[done:num_bytes]], start + done)
            if count == 0:
                raise TensorError(f"{file.name} ends inside of {name}", fix="fetch that file again")
            done += count
        self.bytes_read += num_bytes


def _weight_files(folder: Path) -> list[Path]:
    names = weight_file_names(folder)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(f"{folder} misses {len(absent)} of {len(names)} weight files: {abbreviated(absent)}",
                              fix="fetch them, or correct the index")
    return [folder / name for name in names]


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            header_bytes = struct.unpack("<Q", stream.read(8))[0]
            if header_bytes > min(_MAX_HEADER_BYTES, size):
                raise ValueError(f"header of {header_bytes} bytes in a file of {size}")
            entries = parse_json_object(stream.read(header_bytes), "its header")
        entries.pop("__metadata__", None)
        tensors = {name: _stored_tensor(file, name, entry, 8 + header_bytes) for name, entry in entries.items()}
    except (OSError, ValueError, CheckpointError, struct.error) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}", fix=FETCH_AGAIN) from error
    _check_extents(file, size, tensors)
    return tensors


def _stored_tensor(file: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    """Read what a header says of one tensor. Raises ValueError when it says it wrong."""
    dtype, shape, offsets = (entry.get(key) if isinstance(entry, dict) else None
                             for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _are_counts(shape) and _are_counts(offsets) and len(offsets) == 2
            and offsets[0] <= offsets[1]):
        raise ValueError(f"it describes {name!r} as {shown(entry)}")
    return StoredTensor(file, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_extents(file: Path, size: int, tensors: dict[str, StoredTensor]) -> None:
    cut = [name for name, tensor in tensors.items() if tensor.end > size]
    if cut:
        wanted = max(tensor.end for tensor in tensors.values())
        raise TensorError(f"{file.name} is truncated: {size} of {wanted} bytes; incomplete are {abbreviated(cut)}",
                          fix="fetch that file again")
    odd = [name for name, tensor in tensors.items() if tensor.dtype in _ITEM_BYTES
           and math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype] != tensor.end - tensor.start]
    if odd:
        raise TensorError(f"{file.name}: bytes and shape disagree for {abbreviated(odd)}", fix="fetch that file again")
