"""Changing the placement of the running cluster with the command line, while requests run."""

from __future__ import annotations

import functools
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.deadlines import PATIENCE_S
from tests.e2e.conftest import Service, eventually

pytestmark = pytest.mark.multinode
NUM_STREAMS = 6


def run_placement(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = service.moesaic("placement", *arguments)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def placement(service: Service, *arguments: str) -> tuple[int, str]:
    done = run_placement(service, *arguments)
    return done.returncode, done.stdout + done.stderr


def show(service: Service) -> dict[str, object]:
    done = run_placement(service, "show", "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))        # a busy machine's Ray may have something to say on stderr


@pytest.fixture(scope="module", autouse=True)
def as_it_was(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Other files expect the placement of the start."""
    path = tmp_path_factory.mktemp("placement") / "first.json"
    path.write_text(json.dumps(show(service)))
    yield
    http_client().close()
    http_client.cache_clear()
    code, text = placement(service, "apply", str(path))
    assert code == 0, text


@functools.cache
def http_client() -> httpx.Client:
    """One for all threads: each new one reads the certificates of the world, which takes longer than an answer."""
    return httpx.Client(timeout=PATIENCE_S)


def answer(service: Service, seed: int) -> str:
    body = {"model": "tiny", "prompt": f"request {seed}", "max_tokens": 64, "temperature": 1.0, "seed": seed}
    reply = http_client().post(f"{service.url}/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


class Traffic:
    """The same requests again and again, each in a thread of its own, until told to stop."""

    def __init__(self, service: Service, expected: list[str]) -> None:
        self.num_answers = [0] * len(expected)
        self.wrong: list[str] = []
        self._service = service
        self._expected = expected
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(len(expected))]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, seed: int) -> None:
        while not self._is_over.is_set():
            try:
                found = answer(self._service, seed)
            except Exception as error:
                found = repr(error)
            if found != self._expected[seed]:
                self.wrong.append(found)
            self.num_answers[seed] += 1


def write(path: Path, shown: dict[str, object], holders: list[list[list[int]]]) -> str:
    path.write_text(json.dumps(shown | {"holders": holders}))
    return str(path)


def test_no_request_notices_that_the_placement_changes(service: Service, tmp_path: Path) -> None:
    before = show(service)
    expected = [answer(service, seed) for seed in range(NUM_STREAMS)]
    with_copies = [[[expert % 3] if expert % 2 else [0, 1, 2] for expert in range(8)] for _ in range(3)]
    one_empty = [[[expert % 2] for expert in range(8)] for _ in range(3)]
    with Traffic(service, expected) as traffic:
        for name, holders in (("copies", with_copies), ("empty", one_empty)):
            file = write(tmp_path / f"{name}.json", before, holders)
            code, text = placement(service, "apply", file, "--operation-id", f"e2e-{name}")
            assert code == 0 and "done" in text, text
            assert show(service)["holders"] == holders
        num_answers = list(traffic.num_answers)
        assert eventually(lambda: all(now > then for now, then in
                                      zip(traffic.num_answers, num_answers, strict=True)))
    assert not traffic.wrong
    after = show(service)
    assert after["epoch"] == before["epoch"] and after["members"] != before["members"]


def test_the_same_operation_is_carried_out_once(service: Service, tmp_path: Path) -> None:
    shown = show(service)
    holders = [[[expert % 3] for expert in range(8)] for _ in range(3)]
    file = write(tmp_path / "again.json", shown, holders)
    for _ in range(2):
        code, text = placement(service, "apply", file, "--operation-id", "e2e-once")
        assert code == 0 and "done" in text, text
    code, text = placement(service, "history", "--json")
    changes = [change for change in json.loads(text) if change["operation_id"] == "e2e-once"]
    assert code == 0 and len(changes) == 1 and changes[0]["state"] == "done"


def test_a_placement_of_another_model_is_refused(service: Service, tmp_path: Path) -> None:
    file = write(tmp_path / "wrong.json", show(service), [[[0]] * 8])
    code, text = placement(service, "apply", file)
    assert code == 1 and "the model 3 of 8" in text, text
    (tmp_path / "broken.json").write_text("{")
    code, text = placement(service, "apply", str(tmp_path / "broken.json"))
    assert code == 1 and "is no placement" in text


def test_loads_are_counted_and_the_best_placement_for_them_is_applied(service: Service) -> None:
    answer(service, 0)
    assert eventually(lambda: sum(map(sum, _expert_rows(service))) > 0)
    assert {len(rows) for rows in _expert_rows(service)} == {8}
    code, text = placement(service, "apply", "--operation-id", "e2e-best", "--why", "as counted")
    assert code == 0 and "as counted" in text, text
    figures = show(service)["figures"]
    assert isinstance(figures, dict) and figures["step_s"] >= figures["bound_s"] > 0
    table = service.moesaic("status", "--experts")
    assert table.returncode == 0 and "max/mean" in table.stdout
    assert eventually(lambda: service.metric("placement_revision") > 0)


def _expert_rows(service: Service) -> list[list[float]]:
    rows = show(service)["expert_rows"]
    assert isinstance(rows, list)
    return rows
