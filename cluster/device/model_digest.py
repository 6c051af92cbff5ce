"""Says in one line which model a process computes: of members whose lines differ, numbers may differ too."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from model.checkpoint_files import INDEX_NAME, weight_file_names
from model.errors import CheckpointError
from serving.config import ModelConfig

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("model", "serving", "cluster")
_SOURCES = (".py", ".c", ".h", ".proto")
_LENGTH = 12            # of a hash, as it is shown


def model_digest(config: ModelConfig, folder: Path) -> str:
    """Return checkpoint, revision, dtype and code as `name=value` words. Reads no weights: tens of milliseconds.

    Of files in a folder of one's own the headers and sizes count; of a hub's, which may not be here yet, its commit.
    """
    is_of_hub = "://" in config.path
    checkpoint = hashlib.sha256()
    for name in ("config.json", INDEX_NAME):
        _add_file(checkpoint, folder / name)
    if is_of_hub:
        checkpoint.update(f"{config.path} {folder.name}".encode())
    else:
        for file in _weight_files(folder):
            _add_header(checkpoint, file)
    return (f"checkpoint={checkpoint.hexdigest()[:_LENGTH]} revision={config.revision or 'default'} "
            f"dtype={config.dtype} code={code_version()}")


def code_version(root: Path = _ROOT) -> str:
    """Return a hash of the sources that run here."""
    code = hashlib.sha256()
    for package in _PACKAGES:
        for file in sorted((root / package).rglob("*")):
            if file.suffix in _SOURCES:
                code.update(str(file.relative_to(root)).encode())
                _add_file(code, file)
    return code.hexdigest()[:_LENGTH]


def _weight_files(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in sorted(weight_file_names(folder))]
    except CheckpointError:     # loading says what is wrong
        return []


def _add_file(digest: hashlib._Hash, file: Path) -> None:
    content = file.read_bytes() if file.is_file() else b"absent"
    digest.update(struct.pack("<Q", len(content)))
    digest.update(content)


def _add_header(digest: hashlib._Hash, file: Path) -> None:
    """Add what a safetensors file says of its tensors, and its size. What is wrong with it, loading says."""
    if not file.is_file():
        digest.update(f"{file.name} absent".encode())
        return
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = stream.read(8)
        header_bytes = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
        digest.update(f"{file.name} {size}".encode())
        digest.update(stream.read(min(header_bytes, size)))
