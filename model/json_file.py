"""Reads a JSON file of a checkpoint: somebody else's text, so whatever is wrong with it is a named error. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from model.errors import CheckpointError

FETCH_AGAIN = "fetch it again"


def read_json_object(path: Path) -> dict[str, object]:
    """Return the object in the file. Raises FileNotFoundError without a file, CheckpointError when it holds none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix=FETCH_AGAIN) from error
    return parse_json_object(text, str(path))


def parse_json_object(text: str | bytes, name: str) -> dict[str, object]:
    """Return the object that the content of `name` is. Raises CheckpointError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not valid JSON: {error}", fix=FETCH_AGAIN) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} holds a {type(content).__name__}, not a JSON object", fix=FETCH_AGAIN)
    return content


def shown(value: object, limit: int = 80) -> str:
    """Return a value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit - 3] + "..."
