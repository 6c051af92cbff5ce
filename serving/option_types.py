"""The types of options that are more than one number or word: what a user may write, and what it becomes."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import BeforeValidator, Field, WithJsonSchema

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

# As vLLM names them; of two names of one format (qwen3_xml) the first.
ToolParserName = Literal["hermes", "qwen3_coder", "mistral"]


def parse_bytes(text: object) -> int:
    """Read '1.5GiB', '900 MB' or a plain number as bytes."""
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise ValueError(f"expected a size such as '2GiB' or a number of bytes, got {text!r}")
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size: write for example 900MB, 2GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_host(text: object) -> object:
    """Check an address as sockets take it: brackets and ports belong to URLs."""
    if isinstance(text, str) and (not text or set(text) & set("[]/ ")):
        raise ValueError(f"{text!r} is not a host: write for example 0.0.0.0, ::1 or a name, without brackets")
    return text


def parse_database_url(text: object) -> object:
    """Check the URL of a database. A password would be seen by everybody who sees the config."""
    if isinstance(text, str):
        if not text.startswith(("sqlite:////", "postgresql://")):
            raise ValueError(f"{text.partition(':')[0][:20]!r} is not known: write postgresql://user@host/name, or "
                             "sqlite:////var/lib/moesaic/tenants.db")
        found = urlsplit(text)
        if found.password is not None or "password" in parse_qs(found.query):
            raise ValueError("leave the password out: PostgreSQL's client reads it from the file ~/.pgpass, or the one "
                             "that the variable PGPASSFILE names, on the routers' machines")
    return text


AbsolutePath = Annotated[str, Field(pattern=r"^/.")]
Host = Annotated[str, BeforeValidator(parse_host)]
DatabaseUrl = Annotated[str, BeforeValidator(parse_database_url)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0), WithJsonSchema({"type": ["integer", "string"]})]
CollectorUrl = Annotated[str, Field(pattern=r"^https?://[^/@\s]+(/[^?#\s]*)?$")]     # no password in it
Origin = Annotated[str, Field(pattern=r"^(\*|null|[a-z][a-z0-9+.-]*://[^/\s]+)$")]      # as browsers write it: no path
