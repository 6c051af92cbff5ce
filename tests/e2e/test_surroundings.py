"""A service started from a hostile folder, behind a proxy, with few files and a terminal that knows only ASCII."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from cluster.launch.process_marks import process_of, stop_processes
from cluster.launch.state_file import RunningCluster, read_state
from serving.errors import ServingError
from tests.counting_proxy import CountingProxy
from tests.deadlines import PATIENCE_S
from tests.e2e.conftest import COMMAND_TIMEOUT_S, config_of
from tests.e2e.tiny_model import write_checkpoint

pytestmark = pytest.mark.multinode
ROOT = Path(__file__).parents[2]
MODULES = ("model", "serving", "numpy", "torch", "ray", "grpc", "json", "asyncio", "typing")
NUM_AT_ONCE = 300
FEW_FILES = 256


@pytest.fixture(scope="module")
def proxy() -> Iterator[CountingProxy]:
    proxy = CountingProxy()
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"raise SystemExit('the user has a {name}.py')", encoding="utf-8")
    (folder / "cluster").mkdir()
    (folder / "cluster" / "__init__.py").write_text("raise SystemExit('the user has a cluster')", encoding="utf-8")
    return folder


class Command:
    """`moesaic` as it is installed, in these surroundings."""

    def __init__(self, folder: Path, proxy: CountingProxy, state_dir: Path) -> None:
        self._folder = folder
        self._variables = proxy.variables | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": "",
                                             "MOESAIC_STATE_DIR": str(state_dir)}

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = f"import sys; sys.path.append({str(ROOT)!r}); from cluster.cli.main import main; main()"
        limit = f'ulimit -Sn {FEW_FILES}; exec "$0" "$@"'
        return subprocess.run(["bash", "-c", limit, sys.executable, "-P", "-c", program, *arguments],
                              cwd=self._folder, env={**os.environ, **self._variables}, capture_output=True,
                              encoding="utf-8", timeout=COMMAND_TIMEOUT_S)


@pytest.fixture(scope="module")
def moesaic(hostile_folder: Path, proxy: CountingProxy, tmp_path_factory: pytest.TempPathFactory
            ) -> Iterator[tuple[Command, RunningCluster]]:
    work_dir = tmp_path_factory.mktemp("surroundings")
    write_checkpoint(work_dir / "tiny")
    config = config_of(work_dir / "tiny") | {"application": "surroundings"}
    config["local_nodes"] = [{"name": name, "num_cpus": 2, "resources": {"shard": 1}} for name in ("a", "b")]
    config["pools"] = [dict(pool, replicas=2) for pool in config["pools"]]      # type: ignore[attr-defined]
    (work_dir / "über.yaml").write_text(f"# für ぜんぶ\n{yaml.safe_dump(config)}", encoding="utf-8")
    command = Command(hostile_folder, proxy, work_dir / "state")
    try:
        started = command("up", str(work_dir / "über.yaml"))
        assert started.returncode == 0, started.stdout + started.stderr
        yield command, read_state(work_dir / "state")
        assert command("down").returncode == 0
    finally:
        with contextlib.suppress(ServingError):
            stop_processes(read_state(work_dir / "state").processes)


def test_it_answers_over_both_doors_and_no_byte_passes_the_proxy(
        moesaic: tuple[Command, RunningCluster], proxy: CountingProxy) -> None:
    command, _ = moesaic
    for door in ([], ["--grpc"]):
        answer = command("chat", "hällo", "--max-tokens", "4", "--temperature", "0", *door)
        assert answer.returncode == 0 and "4 tokens" in answer.stderr, answer.stderr
    status = command("status")
    assert status.returncode == 0 and "healthy" in status.stdout, status.stderr
    assert proxy.asked == []


def test_every_process_may_open_as_many_files_as_the_system_lets(moesaic: tuple[Command, RunningCluster]) -> None:
    _, running = moesaic
    nodes = [process for process in map(process_of, running.processes) if process is not None]
    processes = nodes + [child for node in nodes for child in node.children(recursive=True)]
    limits = {process.pid: process.rlimit(psutil.RLIMIT_NOFILE) for process in processes}
    assert len(limits) > 4 and all(soft == min(hard, 1 << 20) > FEW_FILES for soft, hard in limits.values()), limits


async def test_more_requests_than_that_at_once_all_get_an_answer(moesaic: tuple[Command, RunningCluster]) -> None:
    _, running = moesaic
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 1}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False, limits=limits) as client:
        answers = await asyncio.gather(*(client.post(f"{running.http_url}/v1/completions", json=body)
                                         for _ in range(NUM_AT_ONCE)))
    assert {answer.status_code for answer in answers} <= {200, 429}
