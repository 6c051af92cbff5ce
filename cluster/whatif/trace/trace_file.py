"""A trace of requests, read from a CSV file."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from serving.config import ConfigError

COLUMNS = ("timestamp_s", "input_tokens", "output_tokens")
_FIX = "give a CSV file whose first line names timestamp_s, input_tokens and output_tokens"


@dataclass(frozen=True, slots=True)
class TracedRequest:
    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int


def read_trace(path: Path) -> tuple[TracedRequest, ...]:
    """Read the requests in the order of time; other columns are ignored. Raises ConfigError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError(f"trace {path} has no column {', '.join(missing)}", fix=_FIX)
            requests = [_request(path, number, row) for number, row in enumerate(reader, start=2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read trace {path}: {reason}", fix=_FIX) from error
    if not requests:
        raise ConfigError(f"trace {path} has no requests", fix=_FIX)
    return tuple(sorted(requests, key=lambda request: request.at_s))


def _request(path: Path, number: int, row: dict[str, str | None]) -> TracedRequest:
    try:
        at_s, prompt, output = (float(row[column] or "") for column in COLUMNS)
        if not (0 <= at_s < 1e9 and 1 <= prompt < 1e9 and 1 <= output < 1e9):
            raise ValueError
    except ValueError:
        found = ", ".join(f"{column}={row[column]!r}" for column in COLUMNS)
        raise ConfigError(f"trace {path}, line {number}: {found}",
                          fix="give seconds from 0 on, and 1 token or more of prompt and of output") from None
    return TracedRequest(at_s, int(prompt), int(output))
