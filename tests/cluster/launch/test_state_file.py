from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cluster.launch.process_marks import ProcessMark, mark_of
from cluster.launch.state_file import (
    NoClusterError,
    RunningCluster,
    StartingError,
    StateDirError,
    only_starter,
    read_state,
    remove_state,
    require_alive,
    write_state,
)

ONE = RunningCluster("one", "10.0.0.1:6379", "http://127.0.0.1:8000/m", "tiny", "127.0.0.1:9000", "/logs",
                     (ProcessMark(12, 34.5, "gcs_server of a", is_vital=True),), ProcessMark(13, 35.5))


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


WHOLE = json.dumps(asdict(ONE))


@pytest.mark.parametrize("content", [
    "", WHOLE[:len(WHOLE) // 2], "[]", "null", "{}", "nonsense", "\x00" * 40, json.dumps({**asdict(ONE), "more": 1}),
    json.dumps({**asdict(ONE), "processes": 3}), json.dumps({**asdict(ONE), "processes": [{"pid": 1}]}),
    json.dumps({**asdict(ONE), "http_url": None}), json.dumps({**asdict(ONE), "starter": "me"})])
def test_a_note_that_is_broken_is_named_with_what_to_do(tmp_path: Path, content: str) -> None:
    (tmp_path / "one.json").write_text(content, encoding="utf-8")
    with pytest.raises(StateDirError, match=r"one\.json, the note of application 'one', cannot be read.*remove"):
        read_state(tmp_path)


@pytest.mark.parametrize("folder", ["file/state", "file", "a" * 300, "/proc/no-home"])
def test_a_folder_that_cannot_be_used_is_named_with_what_to_do(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StateDirError, match="--state-dir FOLDER, or MOESAIC_STATE_DIR"):
        write_state(ONE, tmp_path / folder)
    with pytest.raises(StateDirError, match="--state-dir FOLDER"), only_starter(tmp_path / folder, "one"):
        pass


def test_one_process_starts_an_application(tmp_path: Path) -> None:
    other = ("import sys; from pathlib import Path; from cluster.launch.state_file import only_starter, StartingError\n"
             "try:\n    with only_starter(Path(sys.argv[1]), 'one'): print('mine')\n"
             "except StartingError as error: print(error)")

    def ask() -> str:
        return subprocess.run([sys.executable, "-c", other, str(tmp_path)], capture_output=True, encoding="utf-8",
                              check=True).stdout
    with only_starter(tmp_path, "one"):
        assert "another `moesaic up` is starting application 'one'" in ask()
        with only_starter(tmp_path, "two"):
            pass
    assert ask() == "mine\n"


def test_what_has_ended_is_said() -> None:
    alive = mark_of(os.getpid(), "raylet of b")
    assert alive is not None
    gone = ProcessMark(1, 1.0, "gcs_server of a", is_vital=True)
    with pytest.raises(NoClusterError, match=r"1 of its 2 processes have ended \(gcs_server of a\).*moesaic down"):
        require_alive(replace(ONE, processes=(gone, alive)))
    with pytest.raises(NoClusterError, match="all its processes have ended"):
        require_alive(replace(ONE, processes=(gone,)))
    require_alive(replace(ONE, processes=(alive, replace(gone, is_vital=False))))     # another node: the group lives on
    require_alive(replace(ONE, processes=()))                                         # a cluster that was there before


def test_a_lock_that_another_holds_is_no_error_of_the_folder(tmp_path: Path) -> None:
    with only_starter(tmp_path, "one"), pytest.raises(StartingError), only_starter(tmp_path, "one"):
        pass
