"""Lines are the same wherever the pieces of a file end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.batches.line_splitter import LineSplitter, RawLine
from serving.errors import InvalidRequestError


@given(st.lists(st.sampled_from([b"a", b"bc", b"\n", b" ", b"\r\n"]), max_size=12), st.integers(1, 5))
def test_pieces_do_not_matter(parts: list[bytes], size: int) -> None:
    content = b"".join(parts)
    splitter, found = LineSplitter(100), []
    for start in range(0, len(content), size):
        found += splitter.feed(content[start:start + size])
    found += splitter.feed(b"", is_last=True)
    assert found == [RawLine(number, content_before(content, number), line)
                     for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    assert all(content[line.first_byte:line.first_byte + len(line.content)] == line.content for line in found)


def content_before(content: bytes, number: int) -> int:
    return sum(len(line) + 1 for line in content.split(b"\n")[:number - 1])


@pytest.mark.parametrize("pieces", [[b"ab\nabcdef\n"], [b"ab\nab", b"cdef"], [b"ab\n", b"abcd", b"ef\nx"]])
def test_a_line_that_is_too_long_is_named(pieces: list[bytes]) -> None:
    splitter = LineSplitter(5)
    with pytest.raises(InvalidRequestError, match="line 2 has more than 5 bytes"):
        for piece in pieces:
            list(splitter.feed(piece))
