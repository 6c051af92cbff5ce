from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.launch.process_marks import ProcessMark
from cluster.launch.state_file import NoClusterError, RunningCluster, read_state, remove_state, write_state

ONE = RunningCluster("one", "10.0.0.1:6379", "http://127.0.0.1:8000/m", "tiny", "127.0.0.1:9000", "/logs",
                     (ProcessMark(12, 34.5),))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_state(ONE, tmp_path / "state")
    assert read_state(tmp_path / "state") == read_state(tmp_path / "state", "one") == ONE
    assert ONE.http_address == "127.0.0.1:8000/m"


def test_threads_may_write_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        writes = [threads.submit(write_state, ONE, tmp_path) for _ in range(400)]
        assert [write.result() for write in writes] == [None] * 400
    assert read_state(tmp_path) == ONE and [path.name for path in tmp_path.iterdir()] == ["one.json"]


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
