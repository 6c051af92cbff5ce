"""Groups of real processes over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.shard.process_group import _local_address
from model.step import StepHeader
from tests.process_pool import JobFailed, ProcessPool, free_rendezvous

pytestmark = pytest.mark.multinode
JOBS = "tests.cluster.shard.group_jobs"
LONG_S = 120.0          # a test that would need this long fails: results are awaited for a shorter time


@pytest.fixture(scope="module")
def pool(worker_pool: ProcessPool) -> ProcessPool:
    return worker_pool


def join(pool: ProcessPool, num_members: int, timeout_s: float = LONG_S) -> None:
    results = pool.run(f"{JOBS}:join", [(free_rendezvous(), num_members, timeout_s)] * num_members)
    assert results == [(rank, num_members) for rank in range(num_members)]


def test_a_process_joins_one_epoch_after_another_with_other_sizes(pool: ProcessPool) -> None:
    for epoch_number, num_members in enumerate((2, 3, 1, 3, 2), start=1):      # worker 2 is fresh when the second forms
        join(pool, num_members)
        headers = tuple(StepHeader(epoch_number, 5, 10 * rank, wants_pause=rank == 1) for rank in range(num_members))
        agreed = pool.run(f"{JOBS}:agree", [(header,) for header in headers])
        assert agreed == [headers] * num_members
        pool.run(f"{JOBS}:leave", [()] * num_members)


@pytest.mark.parametrize("stray", [StepHeader(8, 3, 0), StepHeader(7, 4, 0)])
def test_a_header_of_another_epoch_or_step_is_refused_by_all(pool: ProcessPool, stray: StepHeader) -> None:
    join(pool, 2)
    for message in pool.run(f"{JOBS}:failed_agreement", [(StepHeader(7, 3, 1),), (stray,)]):
        assert f"at step {stray.step_index} of epoch {stray.epoch_number}" in message
        assert "all members must join the next epoch" in message


def test_a_member_that_dies_breaks_the_agreement_at_once_and_survivors_regroup(pool: ProcessPool) -> None:
    join(pool, 3)
    pool.start(f"{JOBS}:failed_agreement", [(StepHeader(1, 0, 1),)] * 3)
    pool.kill(2)
    try:
        for message in pool.results([0, 1], timeout_s=LONG_S / 2):
            assert "did not agree" in message and "wait for the next epoch" in message
    finally:
        pool.restart(2)
    join(pool, 2)
    join(pool, 3)


def test_a_member_that_is_late_ends_the_wait_of_the_others(pool: ProcessPool) -> None:
    join(pool, 2, timeout_s=1.0)
    [message] = pool.run(f"{JOBS}:failed_agreement", [(StepHeader(1, 0, 1),)])
    assert "within 1 s" in message and "raise group.collective_timeout_s" in message


def test_joining_without_the_others_fails_in_time_and_can_be_tried_again(pool: ProcessPool) -> None:
    for _ in range(2):
        [message] = pool.run(f"{JOBS}:failed_join", [(free_rendezvous(), 2, 1.0)])
        assert "could not form the group of 2" in message and "check that every member runs" in message
    join(pool, 2)


def test_a_process_in_a_group_joins_no_second_one(pool: ProcessPool) -> None:
    join(pool, 1)
    with pytest.raises(JobFailed, match="in a group already"):
        pool.run(f"{JOBS}:join_another", [(free_rendezvous(),)])


@pytest.mark.parametrize("rendezvous", ["localhost:29500", "tcp://localhost", "file:///x"])
def test_an_address_that_is_none_is_refused(pool: ProcessPool, rendezvous: str) -> None:
    [message] = pool.run(f"{JOBS}:failed_join", [(rendezvous, 2, 1.0)])
    assert "give it as tcp://host:port" in message


def test_gloo_binds_to_the_interface_that_reaches_the_rendezvous() -> None:
    assert _local_address("127.0.0.1", 29500) == "127.0.0.1"
    assert _local_address("::1", 29500) == "::1"


JOIN_AND_COUNT = """
import sys
started = []
PROCESS_EVENTS = {"subprocess.Popen", "os.posix_spawn", "os.fork", "os.system", "os.exec"}
sys.addaudithook(lambda event, args: started.append((event, args)) if event in PROCESS_EVENTS else None)
from cluster.shard.process_group import ProcessGroup
from model.step import StepHeader
group = ProcessGroup.join(sys.argv[1], 0, 1, 60.0, "auto", "cpu")
group.agree(StepHeader(1, 0, 0))
group.close()
from deepspeed import comm
assert not comm.is_initialized()
sys.stderr.write(f"STARTED {started}")
"""


def test_joining_compiles_nothing_and_leaves_stdout_clean(tmp_path: Path) -> None:
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", JOIN_AND_COUNT, free_rendezvous()], capture_output=True, text=True,
                          env=env, timeout=LONG_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.endswith("STARTED []")
    assert list(tmp_path.iterdir()) == []
