"""modelscope://: the real library against a local server that speaks its protocol, with every way in which it fails."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cluster.device.hub_nodes import CHECKPOINT, Node
from tests.cluster.device.hub_server import COMMIT, OTHER_COMMIT, TOKEN, Failure, FakeHub

_LIST = "/repo/files"


@pytest.fixture
def node(tmp_path: Path, hub: FakeHub) -> Node:
    return Node(tmp_path, hub, "modelscope")


def test_a_cut_file_is_continued_where_it_was_cut(node: Node, hub: FakeHub) -> None:
    hub.cuts = {"model-1.safetensors": 1234}
    whole = node.fetch()
    assert whole.answer["files"]["model-1.safetensors"] == "1" * 5000
    ranges = [wanted for method, path, wanted in hub.requests
              if method == "GET" and path.endswith("#model-1.safetensors")]
    assert ranges == [None, "bytes=1234-"] and hub.bytes_sent["model-1.safetensors"] == 5000


def test_finished_files_are_kept_by_a_fetch_that_fails(node: Node, hub: FakeHub) -> None:
    hub.failures = [Failure("FilePath=model-2", 404)]
    assert "no such repository" in node.fetch().error or "lacks a file" in node.fetch().error
    hub.failures = []
    assert node.fetch().files == set(CHECKPOINT)
    assert hub.bytes_sent["model-1.safetensors"] == 5000


@pytest.mark.parametrize("attribute", ["spoiled", "lengthened"])
def test_wrong_bytes_are_fetched_again_then_named_and_never_kept(node: Node, hub: FakeHub, attribute: str) -> None:
    setattr(hub, attribute, {"config.json"})
    failed = node.fetch()
    assert "other bytes than the hub says" in failed.error and "config.json" in failed.error
    assert "MODELSCOPE_ENDPOINT" in failed.error and hub.num_fetches("config.json") > 1
    assert not list(node.home.rglob("config.json"))
    setattr(hub, attribute, set())
    assert node.fetch().answer["files"]["config.json"] == CHECKPOINT["config.json"].decode()


def test_private_without_a_token_says_what_to_do(node: Node, hub: FakeHub) -> None:
    hub.needs_token = hub.echoes_token = True
    error = node.fetch().error
    assert "private or gated" in error and hub.url in error and "MODELSCOPE_API_TOKEN on every node" in error
    whole = node.fetch(MODELSCOPE_API_TOKEN=TOKEN)
    assert whole.files == set(CHECKPOINT) and TOKEN not in whole.output
    wrong = node.fetch(MODELSCOPE_API_TOKEN="ms-anothersecret", MODELSCOPE_CACHE=str(node.home / "empty"))
    assert "***" in wrong.error and "ms-anothersecret" not in wrong.output


@pytest.mark.parametrize(("failure", "message"), [
    (Failure(_LIST, 403), "this token may not read it"),
    (Failure(_LIST, 401), "private or gated"),
    (Failure(_LIST, 429, {"Retry-After": "0"}), "too many requests.*MODELSCOPE_API_TOKEN"),
    (Failure(_LIST, 503), "fault of its own"),
    (Failure("FilePath=config.json", 403), "this token may not read it"),
    (Failure("FilePath=config.json", 502), "fault of its own"),
    (Failure(_LIST, 200, body='{"Code": 500, "Success": false}'), "lacks a file"),
    (Failure(_LIST, 200, body="<html>"), "could not be fetched")])
def test_a_refusal_is_named(node: Node, hub: FakeHub, failure: Failure, message: str) -> None:
    hub.failures = [failure]
    fetched = node.fetch(MODELSCOPE_API_TOKEN=TOKEN, MODELSCOPE_DOWNLOAD_MAX_RETRIES="0")
    assert re.search(message, fetched.error), fetched.output


def test_a_passing_fault_is_waited_for(node: Node, hub: FakeHub) -> None:
    hub.failures = [Failure(_LIST, 503, times=2)]
    whole = node.fetch()
    assert whole.files == set(CHECKPOINT) and whole.answer["waits"] == [1.0, 4.0]


def test_what_is_not_there_is_named(node: Node, hub: FakeHub) -> None:
    assert "no such repository" in node.fetch(name="owner/none").error
    no_revision = node.fetch(revision="v9").error
    assert "no such revision" in no_revision and "model.revision" in no_revision
    assert "no name of a repository" in node.fetch(name="a/b/c").error
    assert "no name of a repository" in node.fetch(name="../..").error
    del hub.commits[COMMIT]["model-2.safetensors"]
    assert "lacks a file (model-2.safetensors)" in node.fetch().error


def test_a_branch_that_moved_is_fetched_again_where_it_differs(node: Node, hub: FakeHub) -> None:
    node.fetch()
    hub.commits[OTHER_COMMIT] = CHECKPOINT | {"model-1.safetensors": b"9" * 5000}      # of the same size
    hub.branches["master"] = OTHER_COMMIT
    hub.requests.clear()
    assert node.fetch().answer["files"]["model-1.safetensors"] == "9" * 5000
    assert hub.fetched() == {"model-1.safetensors"}


def test_a_file_that_the_branch_has_no_more_is_read_no_more(node: Node, hub: FakeHub) -> None:
    hub.commits[COMMIT] = CHECKPOINT | {"chat_template.jinja": b"{{ messages }}"}
    assert "chat_template.jinja" in node.fetch().files
    hub.commits[COMMIT] = CHECKPOINT
    assert node.fetch().files == set(CHECKPOINT)


def test_a_revision_has_a_folder_of_its_own(node: Node, hub: FakeHub) -> None:
    hub.commits[OTHER_COMMIT] = CHECKPOINT | {"config.json": b'{"model_type": "other"}'}
    hub.branches["v2"] = OTHER_COMMIT
    assert node.fetch(revision="v2").answer["files"]["config.json"] == '{"model_type": "other"}'
    assert node.fetch().answer["files"]["config.json"] == '{"model_type": "tiny"}'


def test_a_restart_lists_and_fetches_and_compares_nothing(node: Node, hub: FakeHub) -> None:
    folder = node.fetch().folder
    hub.requests.clear()
    note = next((node.home / ".cache" / "moesaic" / "hubs").glob("*.json"))
    before = note.read_text()
    assert "Downloading" not in node.fetch().output
    assert [path for _, path, _ in hub.requests] == ["/api/v1/models/owner/model/repo/files"]
    assert note.read_text() == before
    (folder / "model-1.safetensors").write_bytes(b"x" * 5000)       # changed behind its back: compared again
    assert node.fetch().answer["files"]["model-1.safetensors"] == "1" * 5000
    note.write_text("spoiled")
    assert node.fetch().files == set(CHECKPOINT)


@pytest.mark.parametrize("how", ["no server", "server fault", "no access"])
def test_offline_with_a_full_cache(node: Node, hub: FakeHub, how: str) -> None:
    online = node.fetch()
    hub.failures = [Failure("", {"server fault": 503, "no access": 401}.get(how, 200))]
    environment = {"MODELSCOPE_ENDPOINT": "http://127.0.0.1:1"} if how == "no server" else {}
    offline = node.fetch(**environment)
    assert offline.folder == online.folder and offline.files == set(CHECKPOINT)
    assert "checkpoint_from_cache" in offline.output


@pytest.mark.parametrize("cached", [[], ["facts"]])
def test_offline_with_too_little_is_named(node: Node, hub: FakeHub, cached: list[str]) -> None:
    if cached:
        node.fetch(cached)
    error = node.fetch(["all"], MODELSCOPE_ENDPOINT="http://127.0.0.1:1").error
    assert "cannot be reached" in error and "MODELSCOPE_ENDPOINT" in error and "copy the cache of another node" in error


def test_what_the_library_itself_has_fetched_serves_offline(node: Node, hub: FakeHub) -> None:
    online = node.fetch()
    for note in (node.home / ".cache" / "moesaic" / "hubs").glob("*.json"):
        note.unlink()
    offline = node.fetch(MODELSCOPE_ENDPOINT="http://127.0.0.1:1")
    assert offline.folder == online.folder and "checkpoint_from_cache" in offline.output


def test_a_hub_that_never_answers_is_named(node: Node, hub: FakeHub) -> None:
    hub.is_silent = True
    assert "cannot be reached" in node.fetch(MODELSCOPE_REPO_TREE_PAGE_TIMEOUT_SECONDS="1").error
