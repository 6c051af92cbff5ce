"""Groups of real processes, over the transport and over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.shard.process_group import Backend, choose_backend
from model.step import StepHeader
from tests.deadlines import BEYOND_PATIENCE_S, PATIENCE_S
from tests.process_pool import JobFailed, ProcessPool, free_rendezvous

pytestmark = pytest.mark.multinode
JOBS = "tests.cluster.shard.group_jobs"


@pytest.fixture(scope="module")
def pool(worker_pool: ProcessPool) -> ProcessPool:
    return worker_pool


@pytest.fixture(params=["transport", "gloo"])
def backend(request: pytest.FixtureRequest) -> Backend:
    wanted: Backend = request.param
    return wanted


def join(pool: ProcessPool, num_members: int, backend: Backend, timeout_s: float = BEYOND_PATIENCE_S) -> None:
    results = pool.run(f"{JOBS}:join", [(pool.meeting(num_members), timeout_s, backend)] * num_members)
    assert results == [(rank, num_members) for rank in range(num_members)]


def test_rows_go_by_the_transport_unless_all_members_are_accelerators_or_gloo_is_asked_for() -> None:
    assert choose_backend("auto", ["cpu", "cpu"]) == "transport"
    assert choose_backend("auto", ["cuda:0", "cpu"]) == "transport"
    assert choose_backend("auto", ["cuda:0", "cuda:1"]) == "nccl"
    assert choose_backend("gloo", ["cpu", "cuda:0"]) == "gloo"
    assert choose_backend("nccl", ["cuda:0", "cuda:1"]) == "nccl"


def test_a_process_joins_one_epoch_after_another_with_other_sizes(pool: ProcessPool, backend: Backend) -> None:
    for epoch_number, num_members in enumerate((2, 3, 1, 3, 2), start=1):      # worker 2 is fresh when the second forms
        join(pool, num_members, backend)
        headers = tuple(StepHeader(epoch_number, 5, 10 * rank) for rank in range(num_members))
        agreed = pool.run(f"{JOBS}:agree", [(header,) for header in headers])
        assert agreed == [headers] * num_members
        pool.run(f"{JOBS}:leave", [()] * num_members)


@pytest.mark.parametrize("stray", [StepHeader(8, 3, 0), StepHeader(7, 4, 0)])
def test_a_header_of_another_epoch_or_step_is_refused_by_all(
        pool: ProcessPool, stray: StepHeader, backend: Backend) -> None:
    join(pool, 2, backend)
    for message in pool.run(f"{JOBS}:failed_agreement", [(StepHeader(7, 3, 1),), (stray,)]):
        assert f"at step {stray.step_index} of epoch {stray.epoch_number}" in message
        assert "all members must join the next epoch" in message


def test_a_member_that_dies_breaks_the_agreement_at_once_and_survivors_regroup(
        pool: ProcessPool, backend: Backend) -> None:
    join(pool, 3, backend)
    pool.start(f"{JOBS}:failed_agreement", [(StepHeader(1, 0, 1),)] * 3)
    pool.kill(2)
    try:
        for message in pool.results([0, 1]):
            assert "did not agree" in message and "wait for the next epoch" in message
    finally:
        pool.restart(2)
    join(pool, 2, backend)
    join(pool, 3, backend)


def test_a_member_that_is_late_ends_the_wait_of_the_others(pool: ProcessPool, backend: Backend) -> None:
    timeout_s = 1.0
    while True:
        try:
            join(pool, 2, backend, timeout_s)
            break
        except JobFailed:       # a busy machine takes longer to form a group
            timeout_s *= 2
    [message] = pool.run(f"{JOBS}:failed_agreement", [(StepHeader(1, 0, 1),)])
    assert (f"within {timeout_s:g} s" in message or backend == "gloo") and "raise group.collective_timeout_s" in message


def test_joining_without_the_others_fails_in_time_and_can_be_tried_again(
        pool: ProcessPool, backend: Backend) -> None:
    for _ in range(2):
        [message] = pool.run(f"{JOBS}:failed_join", [(pool.meeting(2), 1.0, backend)])
        assert "could not form the group of 2" in message and "check that every member runs" in message
    join(pool, 2, backend)


def test_a_process_in_a_torch_group_joins_no_second_one(pool: ProcessPool) -> None:
    join(pool, 1, "gloo")
    with pytest.raises(JobFailed, match="in a group already"):
        pool.run(f"{JOBS}:join_another", [(pool.meeting(1),)])


JOIN_AND_COUNT = """
import sys
started = []
PROCESS_EVENTS = {"subprocess.Popen", "os.posix_spawn", "os.fork", "os.system", "os.exec"}
sys.addaudithook(lambda event, args: started.append((event, args)) if event in PROCESS_EVENTS else None)
from cluster.shard.process_group import Meeting, ProcessGroup
from model.step import StepHeader
from model.transport.endpoint import Endpoint
endpoint = Endpoint("127.0.0.1")
group = ProcessGroup.join(endpoint, Meeting(1, (endpoint.address,), sys.argv[1]), 0, 60.0, sys.argv[2], "cpu")
group.agree(StepHeader(1, 0, 0))
group.close()
endpoint.close()
assert ("deepspeed" in sys.modules) == (sys.argv[2] == "gloo")
if "deepspeed" in sys.modules:
    from deepspeed import comm
    assert not comm.is_initialized()
sys.stderr.write(f"STARTED {started}")
"""


def test_joining_compiles_nothing_and_leaves_stdout_clean(tmp_path: Path, backend: Backend) -> None:
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", JOIN_AND_COUNT, free_rendezvous(), backend], capture_output=True,
                          text=True, env=env, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.endswith("STARTED []")
    assert list(tmp_path.iterdir()) == []
