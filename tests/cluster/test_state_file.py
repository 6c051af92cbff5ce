from __future__ import annotations

from pathlib import Path

import pytest

from cluster.process_marks import ProcessMark
from cluster.state_file import NoClusterError, RunningCluster, read_state, remove_state, write_state

ONE = RunningCluster("one", "10.0.0.1:6379", "http://127.0.0.1:8000/m", "tiny", "127.0.0.1:9000", "/logs",
                     (ProcessMark(12, 34.5),))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_state(ONE, tmp_path / "state")
    assert read_state(tmp_path / "state") == read_state(tmp_path / "state", "one") == ONE
    assert ONE.http_address == "127.0.0.1:8000/m"


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NoClusterError, match="moesaic up"):
        read_state(tmp_path)
    write_state(ONE, tmp_path)
    with pytest.raises(NoClusterError, match="'two' was started"):
        read_state(tmp_path, "two")
    write_state(RunningCluster("two", "auto", "http://127.0.0.1:8000", "tiny"), tmp_path)
    with pytest.raises(NoClusterError, match=r"one, two.*--application"):
        read_state(tmp_path)
    remove_state(tmp_path, "one")
    remove_state(tmp_path, "one")
    assert read_state(tmp_path).application == "two"
