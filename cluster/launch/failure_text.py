"""Pure. Finds in what Ray Serve says of a failed deployment the error that a person needs."""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_CHARACTERS = 1500
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_GROUP_MARK = re.compile(r"^(?:\s*\| ?)+")          # of the tracebacks of exception groups
_FRAME = re.compile(r'^\s+File "(.+)", line (\d+)')
_ERROR = re.compile(r"^([A-Za-z_][\w.]*)(?:: (.*))?$")
_OURS = ("cluster.", "serving.", "model.")          # their messages are whole sentences, with the fix
_WRAPPERS = ("ray.exceptions.",)                    # say only that something failed elsewhere
_NO_CAUSE = "Traceback (most recent call last):"    # the message of an error whose text is another's traceback


def first_error(text: str) -> str:
    """Return the error that the tracebacks in `text` end with, and where it was raised; without any, the text."""
    lines = [_GROUP_MARK.sub("", line).rstrip() for line in _COLOUR.sub("", text).splitlines()]
    found = list(_errors(lines))
    return (found[-1] if found else " ".join(" ".join(lines).split()))[:MAX_CHARACTERS]


def _errors(lines: list[str]) -> Iterator[str]:
    where = ""
    for index, line in enumerate(lines):
        frame, error = _FRAME.match(line), _ERROR.match(line)
        if frame is not None:
            where = f" ({frame[1]}, line {frame[2]})"
        elif error is not None and where and not line.startswith(_WRAPPERS) and error[2] != _NO_CAUSE:
            message = "\n".join([error[2] or "", *_more_of_message(lines[index + 1:])]).rstrip()
            yield message if line.startswith(_OURS) and message else f"{error[1]}: {message}{where}"
            where = ""


def _more_of_message(lines: list[str]) -> Iterator[str]:
    """Yield the lines of a message that has several: up to an empty one or the next traceback."""
    for line in lines:
        if not line or line == _NO_CAUSE or line.lstrip().startswith("+-") or _FRAME.match(line):
            return
        yield line
