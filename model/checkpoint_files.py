"""Names the files of a Hugging Face folder that hold weights. Loads no torch: whoever fetches a checkpoint asks too."""

from __future__ import annotations

from pathlib import Path

from model.errors import CheckpointError
from model.json_file import FETCH_AGAIN, read_json_object, shown

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_SUFFIX = ".safetensors"


def weight_file_names(folder: Path) -> list[str]:
    """Return the names of all files that hold weights, whether they are there or not. Raises CheckpointError."""
    if (folder / SINGLE_NAME).exists():
        return [SINGLE_NAME]
    index = folder / INDEX_NAME
    try:
        files_of = read_json_object(index).get("weight_map")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}",
                              fix="give the folder of a Hugging Face checkpoint in safetensors format") from error
    if not isinstance(files_of, dict) or not files_of:
        raise CheckpointError(f"{index}: weight_map is {shown(files_of)}, not an object that says which "
                              "file holds each tensor", fix=FETCH_AGAIN)
    return sorted({_checked(file, tensor, index) for tensor, file in files_of.items()})


def _checked(file: object, tensor: object, index: Path) -> str:
    """Return the name of a weight file, if it is one and lies within the checkpoint's folder."""
    fix = f"write the name of a {_SUFFIX} file of that folder, or fetch the index again"
    if not isinstance(file, str) or not file.endswith(_SUFFIX) or not file.isprintable():
        raise CheckpointError(f"{index}: weight_map[{tensor!r}] is {shown(file)}, not the name of a "
                              f"{_SUFFIX} file", fix=fix)
    if "\\" in file or ":" in file or {"", ".", ".."} & set(file.split("/")):
        raise CheckpointError(f"{index}: weight_map[{tensor!r}] is {shown(file)}, which is not within the "
                              "checkpoint's folder", fix=fix)
    return file


def abbreviated(names: list[str], limit: int = 8) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
