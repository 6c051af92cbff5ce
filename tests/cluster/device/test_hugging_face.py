"""hf://: the real library against a local server that speaks the hub's protocol, with every way in which it fails."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from threading import Event

import pytest

from tests.cluster.device.hub_nodes import CHECKPOINT, Node
from tests.cluster.device.hub_server import COMMIT, OTHER_COMMIT, TOKEN, Failure, FakeHub
from tests.deadlines import PATIENCE_S

_COMMIT = "/api/models/owner/model$"         # where it is asked which commit the default branch is


@pytest.fixture
def node(tmp_path: Path, hub: FakeHub) -> Node:
    return Node(tmp_path, hub, "hf")


def test_a_checkpoint_of_one_file(node: Node, hub: FakeHub) -> None:
    hub.commits[COMMIT] = {"config.json": b"{}", "model.safetensors": b"m", "other.safetensors": b"o"}
    assert node.fetch().files == {"config.json", "model.safetensors"}


def test_a_cut_file_is_continued_where_it_was_cut(node: Node, hub: FakeHub) -> None:
    """In steps of the library's blocks of 10 MiB."""
    block = 10 * 2**20
    content = hub.commits[COMMIT]["model-1.safetensors"] = bytes(range(256)) * (3 * block // 256)
    hub.cuts = {"model-1.safetensors": 2 * block + 1}
    whole = node.fetch()
    assert whole.answer["files"]["model-1.safetensors"] == hashlib.sha256(content).hexdigest()
    assert hub.bytes_sent["model-1.safetensors"] == 3 * block + 1
    assert [wanted for method, path, wanted in hub.requests
            if method == "GET" and path.endswith("#model-1.safetensors")] == [None, f"bytes={2 * block}-"]


def test_finished_files_are_kept_by_a_fetch_that_fails(node: Node, hub: FakeHub) -> None:
    hub.failures = [Failure(r"/model-2\.safetensors", 500)]
    assert "fault of its own" in node.fetch().error
    hub.failures = []
    assert node.fetch().files == set(CHECKPOINT) and hub.num_fetches("model-1.safetensors") == 1


@pytest.mark.parametrize("name", ["model-1.safetensors", "config.json"])
def test_wrong_bytes_are_fetched_again_then_named_and_never_kept(node: Node, hub: FakeHub, name: str) -> None:
    hub.spoiled = {name}
    failed = node.fetch()
    assert "other bytes than the hub says" in failed.error and name in failed.error and "HF_ENDPOINT" in failed.error
    assert hub.num_fetches(name) == 2
    hub.spoiled = set()
    assert node.fetch().answer["files"][name] == CHECKPOINT[name].decode()


def test_a_wrong_size_is_named(node: Node, hub: FakeHub) -> None:
    hub.lengthened = {"model-1.safetensors"}
    assert "other bytes than the hub says" in node.fetch().error
    assert not list(node.home.rglob("model-1.safetensors"))


def test_a_process_killed_before_it_compared_leaves_that_to_the_next(node: Node, hub: FakeHub) -> None:
    hub.gate, hub.gated = Event(), "model-2"
    first = node.start()
    assert hub.waiting.acquire(timeout=PATIENCE_S)
    while not list(node.home.rglob("model-1.safetensors")):         # comes on another thread of that process
        assert first.poll() is None
        Event().wait(0.01)
    first.kill()
    first.communicate()
    hub.gate.set()
    spoiled = next(node.home.rglob("model-1.safetensors"))
    spoiled.resolve().write_bytes(b"x" * 5000)
    left = next(node.home.rglob(f".unchecked-{COMMIT}-*"))
    assert node.fetch(["all"]).answer["files"]["model-1.safetensors"] == "1" * 5000
    assert not left.exists()


def test_gated_without_a_token_says_what_to_do(node: Node, hub: FakeHub) -> None:
    hub.needs_token = True
    error = node.fetch().error
    assert "private or gated" in error and f"accept its terms on {hub.url}" in error
    assert "HF_TOKEN on every node" in error
    assert node.fetch(HF_TOKEN=TOKEN).files == set(CHECKPOINT)


def test_the_token_goes_to_the_hub_only_and_never_into_a_log(node: Node, hub: FakeHub) -> None:
    hub.needs_token = True
    whole = node.fetch(HF_TOKEN=TOKEN)
    assert set(hub.tokens_at_storage) == {""} and TOKEN not in whole.output
    hub.needs_token = hub.echoes_token = True
    wrong = node.fetch(HF_TOKEN="hf_anothersecret", HF_HUB_CACHE=str(node.home / "empty"))
    assert "***" in wrong.error and "hf_anothersecret" not in wrong.output
    hub.failures = [Failure(r"Signature", 500)]
    signed = node.fetch(HF_TOKEN=TOKEN, HF_HUB_CACHE=str(node.home / "also_empty"))
    assert "secretsig" not in signed.error and "model-" in signed.error
    hub.failures = []
    with_password = hub.url.replace("http://", "http://user:password@")
    assert "password" not in node.fetch(name="owner/none", HF_ENDPOINT=with_password).error


@pytest.mark.parametrize(("failure", "message"), [
    (Failure(_COMMIT, 403, {"X-Error-Code": "GatedRepo"}), "this token may not read it.*ask its owner"),
    (Failure(_COMMIT, 403), "this token may not read it"),
    (Failure(_COMMIT, 401), "private or gated"),
    (Failure("model-1", 403), "this token may not read it"),
    (Failure("model-1", 404, {"X-Error-Code": "EntryNotFound"}), "lacks a file"),
    (Failure(_COMMIT, 429), "too many requests.*HF_TOKEN"),
    (Failure(_COMMIT, 503), "fault of its own"),
    (Failure("tree", 500), "fault of its own"),
    (Failure("/config.json", 504), "fault of its own")])
def test_a_refusal_is_named(node: Node, hub: FakeHub, failure: Failure, message: str) -> None:
    hub.failures = [failure]
    fetched = node.fetch(HF_TOKEN=TOKEN)
    assert re.search(message, fetched.error), fetched.error


def test_a_passing_fault_is_waited_for(node: Node, hub: FakeHub) -> None:
    hub.failures = [Failure(_COMMIT, 503, times=2), Failure(r"/model-1\.safetensors", 502, times=1)]
    whole = node.fetch()
    assert whole.files == set(CHECKPOINT) and whole.answer["waits"][:2] == [1.0, 4.0]


def test_what_is_not_there_is_named(node: Node, hub: FakeHub) -> None:
    assert "no such repository" in node.fetch(name="owner/none").error
    no_revision = node.fetch(revision="v9").error
    assert "no such revision" in no_revision and "model.revision" in no_revision
    assert "no name of a repository" in node.fetch(name="a/b/c").error
    del hub.commits[COMMIT]["model-2.safetensors"]
    assert "lacks a file (model-2.safetensors)" in node.fetch().error
    hub.commits[OTHER_COMMIT] = {"README.md": b"no checkpoint"}
    assert "lacks a file (config.json)" in node.fetch(revision=OTHER_COMMIT).error


def test_a_revision_is_a_branch_a_tag_or_a_commit(node: Node, hub: FakeHub) -> None:
    hub.commits[OTHER_COMMIT] = CHECKPOINT | {"config.json": b'{"model_type": "other"}'}
    hub.branches |= {"v2": OTHER_COMMIT}
    for revision in ("v2", OTHER_COMMIT):
        assert node.fetch(revision=revision).answer["files"]["config.json"] == '{"model_type": "other"}'
    assert node.fetch().answer["files"]["config.json"] == '{"model_type": "tiny"}'


def test_weights_are_of_the_commit_of_the_facts(node: Node, hub: FakeHub) -> None:
    facts = node.fetch(["facts"])
    hub.commits[OTHER_COMMIT] = {name: content[::-1] for name, content in CHECKPOINT.items()}
    hub.branches["main"] = OTHER_COMMIT
    assert node.fetch(["all"]).folder == facts.folder
    hub.commits[OTHER_COMMIT] = CHECKPOINT | {"config.json": b"{}"}
    assert node.fetch().folder.name == OTHER_COMMIT


@pytest.mark.parametrize("how", ["variable", "no server", "server fault", "no access"])
def test_offline_with_a_full_cache(node: Node, hub: FakeHub, how: str) -> None:
    online = node.fetch()
    hub.requests.clear()
    environment = {"HF_HUB_OFFLINE": "1"} if how == "variable" else {}
    if how == "no server":
        environment = {"HF_ENDPOINT": "http://127.0.0.1:1"}
    hub.failures = [Failure("", {"server fault": 503, "no access": 401}.get(how, 200))]
    offline = node.fetch(**environment)
    assert offline.folder == online.folder and offline.files == set(CHECKPOINT)
    assert "checkpoint_from_cache" in offline.output or "Using cached commit" in offline.output
    assert how in ("server fault", "no access") or not hub.requests


@pytest.mark.parametrize("cached", [[], ["facts"]])
def test_offline_with_too_little_is_named(node: Node, hub: FakeHub, cached: list[str]) -> None:
    if cached:
        node.fetch(cached)
    error = node.fetch(["all"], HF_HUB_OFFLINE="1").error
    assert "set to be offline" in error and "copy the cache of another node" in error
    error = node.fetch(["all"], HF_ENDPOINT="http://127.0.0.1:1").error
    assert "cannot be reached" in error and "HF_ENDPOINT" in error


def test_a_restart_asks_for_the_commit_and_fetches_nothing(node: Node, hub: FakeHub) -> None:
    node.fetch()
    hub.requests.clear()
    node.fetch()
    assert [path for _, path, _ in hub.requests] == ["/api/models/owner/model"]
    hub.requests.clear()
    node.fetch(["all"])
    assert not hub.requests


def test_a_hub_that_never_answers_is_named(node: Node, hub: FakeHub) -> None:
    hub.is_silent = True
    assert "cannot be reached" in node.fetch(HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1").error


def test_a_commit_that_leads_elsewhere_is_refused(node: Node, hub: FakeHub) -> None:
    hub.commits["../../outside"] = CHECKPOINT
    hub.branches["main"] = "../../outside"
    assert "leads out of its folder" in node.fetch().error and not list(node.home.rglob("config.json"))


@pytest.mark.parametrize("etag", ["../../../../outside", "/tmp/outside", "..", "a\\b"])
def test_a_hash_that_leads_elsewhere_is_refused(node: Node, hub: FakeHub, etag: str) -> None:
    hub.etag = etag
    assert "leads out of its folder" in node.fetch().error and not list(node.home.rglob("outside*"))
