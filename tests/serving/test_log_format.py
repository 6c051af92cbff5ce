"""A line of the log as JSON says what the text says."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from serving.log_format import JsonFormatter, log_handler


def shown(message: str, *values: object, **fields: object) -> dict[str, object]:
    record = logging.LogRecord("serving.x", logging.INFO, "x.py", 1, message, values, None)
    record.__dict__.update(fields)
    text = JsonFormatter().format(record)
    assert "\n" not in text
    content: dict[str, object] = json.loads(text)
    return content


def test_an_event_becomes_its_name_and_its_pairs() -> None:
    line = shown("worker_lost node_id=%s rank=%d after_s=%.1f", "node-ä\n", 3, 0.25, created=1_700_000_000.5)
    assert line == {"at": "2023-11-14T22:13:20.500+00:00", "level": "INFO", "logger": "serving.x",
                    "event": "worker_lost", "node_id": "node-ä\n", "rank": 3, "after_s": 0.25}
    assert shown("door_closed")["event"] == "door_closed"
    assert shown("state new=%s", ValueError("no"))["new"] == "no"
    assert shown("state level=%s", 3)["level_"] == 3


@pytest.mark.parametrize(("message", "values"), [
    ("Started server process [%d]", (12,)), ("no pairs at all", ()), ("planned_with_work shard_id=%s %s", ("a", "b")),
    ("%s=%d", ("a", 1))])
def test_what_is_no_event_keeps_its_message(message: str, values: tuple[object, ...]) -> None:
    line = shown(message, *values)
    assert line["message"] == message % values and "event" not in line


def test_an_error_brings_its_trace_in_the_same_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        line = shown("plan_failed", exc_info=sys.exc_info())
    assert line["event"] == "plan_failed" and "ValueError: broken" in str(line["error_trace"])


def test_json_goes_to_stdout_and_text_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    for log_format in ("json", "text"):
        record = logging.LogRecord("serving.x", logging.INFO, "x.py", 1, "door_open port=%d", (80,), None)
        log_handler(log_format).emit(record)
    captured = capsys.readouterr()
    assert json.loads(captured.out)["port"] == 80 and captured.err.endswith("INFO serving.x door_open port=80\n")
