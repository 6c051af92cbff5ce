"""Log lines as JSON objects, for those who collect them.

A line of ours is an event's name and key=value pairs, so its template has the keys and its arguments the values.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
_PAIR = re.compile(r"(\w+)=%[-+ #0-9.]*[a-z]")
_PLACEHOLDER = re.compile(r"%[-+ #0-9.]*[a-z]")
_OWN = ("at", "level", "logger", "event", "message", "error_trace")


class JsonFormatter(logging.Formatter):
    """Makes one object of a record: at, level, logger, event, the pairs of the line, error_trace. What is no event with
    pairs has a message."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {"at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
                                   "level": record.levelname, "logger": record.name}
        pairs = _pairs(record)
        if pairs is None:
            line["message"] = record.getMessage()
        else:
            line |= {"event": record.msg.split(" ", 1)[0]} | pairs
        if record.exc_info:
            line["error_trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def log_handler(log_format: LogFormat) -> logging.Handler:
    """Return what writes text to stderr, as it always was, or JSON to stdout."""
    if log_format == "text":
        handler: logging.Handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_TEXT))
        return handler
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    return handler


def _pairs(record: logging.LogRecord) -> dict[str, object] | None:
    """Return the line's pairs; None when its template is not an event's name and pairs alone."""
    template, values = record.msg, record.args
    if not isinstance(template, str) or not isinstance(values, tuple) or not re.match(r"\w+( |$)", template):
        return None
    keys = _PAIR.findall(template)
    words = template.split(" ")[1:]
    if len(keys) != len(values) or len(_PLACEHOLDER.findall(template)) != len(keys) or len(words) != len(keys):
        return None
    return {f"{key}_" if key in _OWN else key: _plain(value) for key, value in zip(keys, values, strict=True)}


def _plain(value: object) -> object:
    is_json = value is None or type(value) in (bool, int, float, str)
    return value if is_json else str(value)
