"""What is asked of every hub; several processes of a node fetch a checkpoint once."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from threading import Event

import pytest

from tests.cluster.device.hub_nodes import CHECKPOINT, INDEX, Node, finish
from tests.cluster.device.hub_server import COMMIT, Failure, FakeHub
from tests.deadlines import PATIENCE_S


@pytest.fixture(params=["hf", "modelscope"])
def node(tmp_path: Path, hub: FakeHub, request: pytest.FixtureRequest) -> Node:
    return Node(tmp_path, hub, request.param)


def _start(node: Node) -> subprocess.Popen[str]:
    return node.start(fake_sleep=False, report_s=0.05)


def _until_report(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return str(json.loads(line)["report"])
    raise AssertionError(f"{words!r} was never said")


def test_facts_then_weights_and_nothing_else(node: Node, hub: FakeHub) -> None:
    facts = node.fetch(["facts"])
    assert facts.files == hub.fetched() == {"config.json", "tokenizer.json", INDEX}
    whole = node.fetch(["all"])
    assert whole.files == hub.fetched() == set(CHECKPOINT) and whole.folder == facts.folder
    assert whole.answer["files"] == {name: content.decode() for name, content in CHECKPOINT.items()}
    assert all(hub.num_fetches(name) == 1 for name in CHECKPOINT)
    assert whole.folder.is_relative_to(node.home) and not list(node.home.rglob("outside.json"))


def test_several_processes_fetch_once_and_the_others_say_how_far_it_is(node: Node, hub: FakeHub) -> None:
    hub.gate = Event()
    first = _start(node)
    assert hub.waiting.acquire(timeout=PATIENCE_S)
    others = [_start(node) for _ in range(2)]
    waits = [_until_report(process, "waits for another process of this node") for process in others]
    assert all(f"{node.scheme}://owner/model" in line and line.endswith("GB here") for line in waits)
    assert "fetches" in _until_report(first, "fetches")
    hub.gate.set()
    assert all(finish(process).files == set(CHECKPOINT) for process in [first, *others])
    assert {name: hub.num_fetches(name) for name in CHECKPOINT} == dict.fromkeys(CHECKPOINT, 1)


def test_the_lock_of_a_process_that_was_killed_is_free(node: Node, hub: FakeHub) -> None:
    hub.gate = Event()
    first = _start(node)
    assert hub.waiting.acquire(timeout=PATIENCE_S)
    second = _start(node)
    _until_report(second, "waits for another process of this node")
    first.kill()
    first.communicate()
    hub.gate.set()
    assert finish(second).files == set(CHECKPOINT)


def test_who_needs_facts_only_does_not_wait_for_weights(node: Node, hub: FakeHub) -> None:
    hub.gate, hub.gated = Event(), "model-1"
    first = _start(node)
    assert hub.waiting.acquire(timeout=PATIENCE_S)
    assert node.fetch(["facts"]).folder.is_dir() and first.poll() is None
    hub.gate.set()
    assert finish(first).files == set(CHECKPOINT)
    assert hub.num_fetches("config.json") == 1


def test_a_failure_of_one_is_tried_again_by_the_next(node: Node, hub: FakeHub) -> None:
    hub.failures = [Failure("model-1", 403)]
    assert "may not read it" in node.fetch().error
    hub.failures = []
    assert node.fetch().files == set(CHECKPOINT)


def test_a_connection_that_is_reset_is_made_again_as_long_as_files_come(node: Node, hub: FakeHub) -> None:
    hub.resets.update({name: 2 for name in CHECKPOINT})
    whole = node.fetch()
    assert whole.answer["files"] == {name: content.decode() for name, content in CHECKPOINT.items()}


def test_an_index_that_leads_elsewhere_is_refused(node: Node, hub: FakeHub) -> None:
    hub.commits[COMMIT] = CHECKPOINT | {INDEX: b'{"weight_map": {"a": "../../outside.safetensors"}}'}
    assert "not within the checkpoint's folder" in node.fetch().error
    assert hub.fetched() == {"config.json", "tokenizer.json", INDEX}


def test_a_repository_without_safetensors_is_named(node: Node, hub: FakeHub) -> None:
    hub.commits[COMMIT] = {"config.json": b"{}", "pytorch_model.bin": b"b"}
    error = node.fetch().error
    assert "lacks a file (model.safetensors)" in error and "safetensors format" in error


@pytest.mark.skipif(os.getuid() == 0 and not Path("/proc/self").exists(), reason="needs /proc, where nobody can write")
def test_without_a_lock_it_goes_on(node: Node) -> None:
    fetched = node.fetch(XDG_CACHE_HOME="/proc/nowhere", HF_HOME=str(node.home), MODELSCOPE_CACHE=str(node.home))
    assert fetched.files == set(CHECKPOINT) and "checkpoint_lock_unavailable" in fetched.output


def test_a_cache_that_cannot_be_written_is_named(node: Node) -> None:
    (node.home / "file").write_text("")
    error = node.fetch(HF_HOME=str(node.home / "file"), MODELSCOPE_CACHE=str(node.home / "file")).error
    assert "cache cannot be written" in error and ("HF_HOME" in error or "MODELSCOPE_CACHE" in error)
