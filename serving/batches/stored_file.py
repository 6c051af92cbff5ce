"""A file that a tenant has given, or that a batch has written. Pure."""

from __future__ import annotations

import enum
import secrets
from dataclasses import dataclass

CHUNK_BYTES = 256 * 2**10       # of an uploaded file, all but its last; one line of a batch's output is one chunk
MAX_FILES = 1000                # of one tenant
MAX_FILENAME_CHARACTERS = 255


class Purpose(enum.StrEnum):
    BATCH = "batch"
    BATCH_OUTPUT = "batch_output"


@dataclass(frozen=True, slots=True)
class StoredFile:
    file_id: str
    tenant: str                 # empty: whoever has no key, where none is needed
    filename: str
    purpose: Purpose
    num_bytes: int
    created_s: float            # Unix time
    expires_s: float


def new_file(tenant: str, filename: str, purpose: Purpose, now_s: float, keep_s: float) -> StoredFile:
    """Return an empty file of a new id. Of its name only what can be shown stays."""
    shown = "".join(character for character in filename if character.isprintable())[:MAX_FILENAME_CHARACTERS]
    return StoredFile(f"file-{secrets.token_hex(12)}", tenant, shown or "file", purpose, 0, now_s, now_s + keep_s)
