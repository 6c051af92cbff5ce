"""The running cluster: what it reports, what it costs when idle, and a coordinator that dies."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.launch.state_file import read_state
from tests.deadlines import PATIENCE_S
from tests.e2e.conftest import APPLICATION, Service, eventually, moesaic

pytestmark = pytest.mark.multinode
IDLE_WINDOW_S = 8.0
IDLE_SHARE = 0.02       # of one core


def busy_s(process: psutil.Process) -> float:
    """Return that of all threads but the main one, where Ray's loop polls: about 1 % of a core in an idle worker."""
    return float(sum(thread.user_time + thread.system_time for thread in process.threads() if thread.id != process.pid))


def shards_of(status: dict[str, object]) -> list[tuple[dict[str, object], dict[str, int]]]:
    shards = status["shards"]
    assert isinstance(shards, list)
    return [(member, shard) for member, shard in shards]


def test_status_shows_three_nodes_that_share_the_experts(service: Service) -> None:
    status = service.status()
    assert status["is_ready"]
    shards = shards_of(status)
    assert sorted(str(member["node_name"]) for member, _ in shards) == ["a", "b", "c"]
    copies = [shard["num_expert_copies"] for _, shard in shards]        # 3 layers of 8 experts; spare slots hold copies
    assert sum(copies) >= 24 and all(0 < count <= 24 for count in copies), copies
    assert all(0 < shard["resident_bytes"] < 800_000_000 for _, shard in shards)
    table = moesaic("status", "--state-dir", str(service.state_dir))
    assert table.returncode == 0 and "healthy" in table.stdout


def test_status_finds_the_only_application_of_a_ray_cluster(service: Service, tmp_path: Path) -> None:
    """As in a pod, where nothing was started from."""
    address = read_state(service.state_dir).address
    table = moesaic("status", "--address", address, "--state-dir", str(tmp_path))
    assert table.returncode == 0 and "healthy" in table.stdout


@pytest.mark.parametrize("door", [[], ["--grpc"]])
def test_chat_streams_an_answer(service: Service, door: list[str]) -> None:
    answer = moesaic("chat", "hello world", "--max-tokens", "4", "--temperature", "0", "--state-dir",
                     str(service.state_dir), *door)
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr


def test_an_idle_group_burns_no_cpu(service: Service) -> None:
    assert eventually(service.is_empty)
    processes = service.shard_processes()
    assert len(processes) == 3
    before = [busy_s(process) for process in processes]
    began_s = time.monotonic()
    eventually(lambda: False, timeout_s=IDLE_WINDOW_S)
    window_s = time.monotonic() - began_s
    shares = [(busy_s(process) - busy) / window_s for process, busy in zip(processes, before, strict=True)]
    assert max(shares) < IDLE_SHARE, shares


def epoch_number(service: Service, application: str = APPLICATION) -> int:
    """Return 0 while no epoch runs."""
    view = service.status(application)["view"]
    assert isinstance(view, dict)
    return int(view["epoch"]["number"]) if view["epoch"] else 0


def test_a_coordinator_that_dies_is_not_missed(service: Service) -> None:
    """Traffic goes on while it is away; the new one hears everything from the members and keeps the epoch."""
    pids = {process.pid for process in service.shard_processes()}
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 16, "temperature": 0}
    before = httpx.post(f"{service.url}/v1/completions", json=body, timeout=PATIENCE_S).json()["choices"][0]["text"]
    number = epoch_number(service)
    service.ray("kill_coordinator", APPLICATION)
    after = httpx.post(f"{service.url}/v1/completions", json=body, timeout=PATIENCE_S).json()["choices"][0]["text"]
    assert after == before
    assert eventually(lambda: bool(service.status()["is_ready"]) and len(shards_of(service.status())) == 3)
    assert epoch_number(service) == number
    assert {process.pid for process in service.shard_processes()} == pids


def test_a_second_start_is_refused(service: Service) -> None:
    again = moesaic("up", str(service.work_dir / "config.yaml"), "--state-dir", str(service.state_dir))
    assert again.returncode == 1 and "runs already" in again.stderr and "Traceback" not in again.stderr


def test_another_config_is_refused_and_what_differs_is_named(service: Service) -> None:
    path = service.work_dir / "other.yaml"
    text = (service.work_dir / "config.yaml").read_text().replace("max_batch_tokens: 256", "max_batch_tokens: 512")
    path.write_text(text)
    other = moesaic("up", str(path), "--state-dir", str(service.state_dir))
    assert other.returncode == 1 and "Traceback" not in other.stderr
    assert "scheduler.max_batch_tokens is 256 there and 512 here" in other.stderr
