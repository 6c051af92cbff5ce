"""Real worker processes for tests of process groups: started once, given jobs by name, bounded in time.

A worker dies with its parent: its pipe closes, and the kernel kills it should it be inside a collective.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from cluster.shard.process_group import Meeting
from model.transport.address import EndpointAddress
from model.transport.endpoint import Endpoint
from tests.deadlines import PATIENCE_S
from tests.ports import held_port

_PR_SET_PDEATHSIG = 1


@dataclass
class Worker:
    """Holds what jobs keep between calls, in the worker's process."""

    index: int
    kept: dict[str, Any] = field(default_factory=dict)

    def endpoint(self) -> Endpoint:
        """Return this process's, for all groups that its jobs join."""
        if "endpoint" not in self.kept:
            self.kept["endpoint"] = Endpoint("127.0.0.1")
        endpoint: Endpoint = self.kept["endpoint"]
        return endpoint


class JobFailed(Exception):
    pass


class ProcessPool:
    """`num_workers` processes. A job is "module:function", called as function(worker, *arguments)."""

    def __init__(self, num_workers: int) -> None:
        started = [_start_worker(index) for index in range(num_workers)]
        self._processes = [process for process, _ in started]
        self._pipes = [pipe for _, pipe in started]
        self._job_id = 0
        self._num_meetings = 0

    def start(self, job: str, arguments_of_worker: Sequence[tuple[object, ...]]) -> None:
        """Give worker i the job with arguments_of_worker[i]; workers beyond the list get nothing."""
        self._job_id += 1
        for pipe, arguments in zip(self._pipes, arguments_of_worker, strict=False):
            pipe.send((self._job_id, job, arguments))

    def results(self, workers: Sequence[int]) -> list[Any]:
        """Results of the job last started, one for each of `workers`. Raises JobFailed with a worker's traceback."""
        deadline = time.monotonic() + PATIENCE_S
        answers: list[Any] = []
        for index in workers:
            job_id = None
            while job_id != self._job_id:           # an earlier job may have been given up
                if not self._pipes[index].poll(max(deadline - time.monotonic(), 0.0)):
                    raise JobFailed(f"worker {index} gave no result within {PATIENCE_S:g} s")
                job_id, succeeded, answer = self._pipes[index].recv()
            if not succeeded:
                raise JobFailed(f"worker {index}:\n{answer}")
            answers.append(answer)
        return answers

    def run(self, job: str, arguments_of_worker: Sequence[tuple[object, ...]]) -> list[Any]:
        self.start(job, arguments_of_worker)
        return self.results(range(len(arguments_of_worker)))

    def meeting(self, num_members: int) -> Meeting:
        """Return where workers 0, 1, ... meet for their next group."""
        self._num_meetings += 1
        addresses = self.run("tests.process_pool:endpoint_address", [()] * num_members)
        return Meeting(self._num_meetings, tuple(addresses), free_rendezvous())

    def kill(self, index: int) -> None:
        """As a crash does: no goodbye. Give it no job until restart()."""
        self._pipes[index].close()
        self._processes[index].kill()
        self._processes[index].join()

    def restart(self, index: int) -> None:
        self._processes[index], self._pipes[index] = _start_worker(index)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
            process.close()


def endpoint_address(worker: Worker) -> EndpointAddress:
    return worker.endpoint().address


def free_rendezvous() -> str:
    """Return an address where the first member of a group can open its store, whoever else asks for ports."""
    return f"tcp://127.0.0.1:{held_port()}"


def _start_worker(index: int) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, index, os.getpid()), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(pipe: Connection, index: int, parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    import torch
    torch.set_num_threads(1)
    worker = Worker(index)
    while True:
        try:
            job_id, job, arguments = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        module, _, function = job.partition(":")
        try:
            answer = getattr(importlib.import_module(module), function)(worker, *arguments)
            pipe.send((job_id, True, answer))
        except Exception:
            pipe.send((job_id, False, traceback.format_exc()))
