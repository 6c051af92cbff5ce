"""Profiles on disk: kept, found again, refused when broken; one measurement at a time."""

from __future__ import annotations

import json
import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.device.profile_store import ProfileStore
from serving.link.epoch import Link
from tests.cluster.profiles import PROFILE
from tests.deadlines import PATIENCE_S

FACTS = {"device": "a CPU", "num_threads": 1, "sliding_window": None, "qk_norm": True}


def test_a_profile_is_found_again_by_its_facts_alone(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path / "profiles")
    assert store.read(FACTS) is None
    profile = replace(PROFILE, link=Link(1e-4, 1e9), is_noisy=True, spread=0.2)
    with store.lock(1.0):
        store.write(FACTS, profile)
    found = ProfileStore(tmp_path / "profiles").read(dict(reversed(FACTS.items())))
    assert found is not None and found.profile == profile and found.measured_at_s > 1e9
    assert store.read(FACTS | {"num_threads": 2}) is None
    assert sorted(path.suffix for path in store.folder.iterdir()) == ["", ".json"]


@pytest.mark.parametrize("spoil", [
    lambda text: "",
    lambda text: text[:100],
    lambda text: text.replace('"read_bytes_per_s": 20000000000.0', '"read_bytes_per_s": "fast"'),
    lambda text: text.replace('"read_bytes_per_s": 20000000000.0', '"read_bytes_per_s": NaN'),
    lambda text: text.replace('"dense_s"', '"dens_s"'),
    lambda text: text.replace("0.0008", "-1.0")])
def test_a_broken_file_is_no_profile_and_says_so(tmp_path: Path, spoil: object,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    store = ProfileStore(tmp_path)
    store.write(FACTS, PROFILE)
    path = store.path_of(FACTS)
    text = path.read_text()
    path.write_text(spoil(text))    # type: ignore[operator]
    assert path.read_text() != text
    with caplog.at_level(logging.WARNING):
        assert store.read(FACTS) is None
    assert "profile_unreadable" in caplog.text and str(path) in caplog.text


def test_a_file_of_other_facts_is_not_taken(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    store.write(FACTS, PROFILE)
    content = json.loads(store.path_of(FACTS).read_text())
    content["facts"]["device"] = "another"
    store.path_of(FACTS).write_text(json.dumps(content))
    assert store.read(FACTS) is None


def test_a_folder_that_cannot_be_used_costs_a_warning_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = ProfileStore(tmp_path / "file" / "profiles")
    with store.lock(1.0):
        store.write(FACTS, PROFILE)
    assert store.read(FACTS) is None
    assert "profile_lock_unavailable" in caplog.text and "profile_not_kept" in caplog.text


def _hold(folder: Path, held: object, release: object) -> None:
    with ProfileStore(folder).lock(10.0):
        held.set()          # type: ignore[attr-defined]
        release.wait(PATIENCE_S)    # type: ignore[attr-defined]


def test_the_lock_is_for_one_process_and_ends_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held, release), daemon=True)
    process.start()
    assert held.wait(PATIENCE_S)
    with ProfileStore(tmp_path).lock(0.1):
        assert "profile_lock_unavailable" in caplog.text    # given up after the timeout, and gone on
    caplog.clear()
    process.kill()
    process.join()
    with ProfileStore(tmp_path).lock(10.0):
        assert not caplog.text
