"""An input file is looked through as a whole, and what is wrong is told with its line."""

from __future__ import annotations

import pytest

from serving.batches import validation
from serving.batches.batch import MAX_ERRORS, BatchFault, LineEntry
from serving.batches.validation import InputCheck, LineHead
from serving.errors import InvalidRequestError


def check(content: bytes, endpoint: str) -> LineHead:
    """A line is its custom_id; one that begins with ! is wrong."""
    if content.startswith(b"!"):
        raise InvalidRequestError("wrong", fix="mend it", param="url")
    return LineHead(content.decode(), f"model of {endpoint}")


def found(content: bytes, max_lines: int = 100) -> tuple[list[LineEntry], list[BatchFault]]:
    checked = InputCheck("/v1", max_lines, check)
    entries = checked.feed(content)
    entries += checked.feed(b"", is_last=True) if not checked.is_over else []
    return entries, checked.faults


def test_right_lines_are_known_by_where_they_stand() -> None:
    checked = InputCheck("/v1", 2, check)
    assert checked.feed(b"ab\n\nc", is_last=False) == [LineEntry(1, "ab", 0, 2)]
    assert checked.feed(b"d", is_last=True) == [LineEntry(3, "cd", 4, 2)]
    assert checked.model == "model of /v1" and not checked.faults


@pytest.mark.parametrize(("content", "codes", "lines"), [
    (b"a\n!\nb\n!", ["invalid_line", "invalid_line"], [2, 4]), (b"a\nb\na", ["duplicate_custom_id"], [3]),
    (b"", ["empty_file"], [None]), (b"\n \n", ["empty_file"], [None]),
    (b"a\nb\nc\nd\n!", ["too_many_lines"], [None]), (b"a\n" + b"x" * 99, ["line_too_long"], [None]),
    (b"!\n" * 99, ["invalid_line"] * MAX_ERRORS, [*range(1, MAX_ERRORS + 1)])])
def test_what_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch, content: bytes, codes: list[str],
                               lines: list[int | None]) -> None:
    monkeypatch.setattr(validation, "MAX_LINE_BYTES", 50)
    _, faults = found(content, max_lines=3)
    assert [fault.code for fault in faults] == codes and [fault.line for fault in faults] == lines
    assert all(fault.message for fault in faults)
