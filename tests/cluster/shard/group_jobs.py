"""The worker processes of the process group tests do these jobs."""

from __future__ import annotations

from cluster.shard.process_group import Backend, Meeting, ProcessGroup
from model.errors import GroupError
from model.step import StepHeader
from tests.process_pool import Worker


def join(worker: Worker, meeting: Meeting, timeout_s: float, backend: Backend = "transport") -> tuple[int, int]:
    """Leave the last group and join the next -> (rank, num_members)."""
    leave(worker)
    group = ProcessGroup.join(worker.endpoint(), meeting, worker.index, timeout_s, backend, "cpu")
    worker.kept["group"] = group
    return group.rank, group.num_members


def leave(worker: Worker) -> None:
    if "group" in worker.kept:
        worker.kept.pop("group").close()


def agree(worker: Worker, header: StepHeader) -> tuple[StepHeader, ...]:
    headers: tuple[StepHeader, ...] = worker.kept["group"].agree(header)
    return headers


def failed_agreement(worker: Worker, header: StepHeader) -> str:
    """Agree on step after step until it fails -> the GroupError's text."""
    step_index = header.step_index
    try:
        while True:
            worker.kept["group"].agree(StepHeader(header.epoch_number, step_index, header.num_tokens))
            step_index += 1
    except GroupError as error:
        return str(error)


def failed_join(worker: Worker, meeting: Meeting, timeout_s: float, backend: Backend) -> str:
    leave(worker)
    try:
        join(worker, meeting, timeout_s, backend)
    except GroupError as error:
        return str(error)
    return "joined"


def join_another(worker: Worker, meeting: Meeting) -> None:
    """Without leaving the last one."""
    ProcessGroup.join(worker.endpoint(), meeting, worker.index, 30.0, "gloo", "cpu")
