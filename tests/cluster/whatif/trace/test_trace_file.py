"""A trace is read in the order of time, and what is wrong with it is said with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.whatif.trace.trace_file import TracedRequest, read_trace
from serving.config import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_requests_come_in_the_order_of_time_whatever_other_columns_there_are(tmp_path: Path) -> None:
    path = written(tmp_path, "hash_ids,timestamp_s,input_tokens,output_tokens\n1 2,3.5,10,2\n,0.25,7,1\n")
    assert read_trace(path) == (TracedRequest(0.25, 7, 1), TracedRequest(3.5, 10, 2))


@pytest.mark.parametrize(("text", "message"), [
    ("timestamp_s,input_tokens\n1,2\n", "no column output_tokens"),
    ("", "no column"),
    ("timestamp_s,input_tokens,output_tokens\n", "no requests"),
    ("timestamp_s,input_tokens,output_tokens\n1,2,3\nnan,2,3\n", "line 3"),
    ("timestamp_s,input_tokens,output_tokens\n1,0,3\n", "line 2"),
    ("timestamp_s,input_tokens,output_tokens\n1,2\n", "output_tokens=None")])
def test_what_is_wrong_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(written(tmp_path, text))


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read trace"):
        read_trace(tmp_path / "none.csv")
