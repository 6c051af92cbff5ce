"""Writes a Hugging Face checkpoint folder one safetensors file at a time: a model larger than memory can be made.

A file gets its final name only when it is whole; a writer that was stopped goes on with the first file missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint_files import INDEX_NAME


class CheckpointWriter:
    """Fills `folder` with model-0000i-of-0000n.safetensors; `finish` writes their index."""

    def __init__(self, folder: Path, num_files: int) -> None:
        self.folder = folder
        self.num_files = num_files
        self._file_of_tensor: dict[str, str] = {}
        self.total_bytes = 0            # of the weight files so far
        folder.mkdir(parents=True, exist_ok=True)

    def add_file(self, index: int, make_tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Write file `index` (0 .. num_files - 1) unless it is there. Tensors must share no memory."""
        path = self.folder / f"model-{index + 1:05d}-of-{self.num_files:05d}.safetensors"
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            save_file(make_tensors(), unfinished, metadata={"format": "pt"})
            os.replace(unfinished, path)
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
        for name in names:
            self._file_of_tensor[name] = path.name
        self.total_bytes += path.stat().st_size

    def add_json(self, name: str, content: dict[str, object]) -> None:
        (self.folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def finish(self) -> int:
        """Write the index. Returns the bytes of all weight files."""
        self.add_json(INDEX_NAME, {"metadata": {"total_size": self.total_bytes},
                                   "weight_map": dict(sorted(self._file_of_tensor.items()))})
        return self.total_bytes
