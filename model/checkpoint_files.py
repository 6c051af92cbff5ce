"""Which files of a Hugging Face folder hold weights. Loads no torch: whoever fetches a checkpoint asks too."""

from __future__ import annotations

import json
from pathlib import Path

from model.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def weight_file_names(folder: Path) -> list[str]:
    """Return the names of all files that hold weights, whether they are there or not. Raises CheckpointError."""
    if (folder / SINGLE_NAME).exists():
        return [SINGLE_NAME]
    index = folder / INDEX_NAME
    try:
        names = sorted({_inside(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}",
                              fix="give the folder of a Hugging Face checkpoint in safetensors format") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error!r}", fix="fetch it again") from error
    return names


def _inside(name: object) -> str:
    """Return the name of a weight file. Raises ValueError when it is none, or leads out of the checkpoint's folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{name!r} is no file name")
    if name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
        raise ValueError(f"{name!r} is not a file of this folder")
    return name


def abbreviated(names: list[str], limit: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
