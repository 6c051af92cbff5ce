"""Time of one all-to-all between processes of this machine: the transport over shared memory and TCP, beside Gloo.

`python benchmarks/transport.py [--members 2,3] [--bytes 4096,65536,1048576,16777216,67108864] [--seconds 1.0]`. Every
member sends so many bytes to each other one. What is compared takes turns. Figures are rank 0's: the median time of a
call, and in brackets the CPU time of a call, all threads together, which other programs change less. deepspeed.comm is
called as model/dispatch calls it, with its own group of Gloo.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import describe  # noqa: E402
from cluster.device.node import free_port  # noqa: E402
from cluster.shard.process_group import Meeting, ProcessGroup  # noqa: E402
from model.dispatch.carriers import Carrier, carrier_of  # noqa: E402
from model.transport.endpoint import Endpoint  # noqa: E402

WAYS = ("shared memory", "TCP", "Gloo")
TIMEOUT_S = 120.0
NUM_TURNS = 5
MIN_CALLS = 5


def join_all(rank: int, rendezvous: str, pipe: Connection) -> dict[str, ProcessGroup]:
    endpoints = {"shared memory": Endpoint("127.0.0.1"), "TCP": Endpoint("127.0.0.1", machine="")}
    pipe.send({way: endpoint.address for way, endpoint in endpoints.items()})
    addresses = pipe.recv()
    groups = {way: ProcessGroup.join(endpoint, Meeting(1, addresses[way], ""), rank, TIMEOUT_S, "transport", "cpu")
              for way, endpoint in endpoints.items()}
    groups["Gloo"] = ProcessGroup.join(endpoints["TCP"], Meeting(2, addresses["TCP"], rendezvous), rank, TIMEOUT_S,
                                       "gloo", "cpu")
    return groups


def time_calls(exchange: Callable[[], None], num_calls: int) -> list[tuple[float, float]]:
    """Return the seconds of each call, and the CPU seconds that it took on average."""
    seconds, began_cpu_s = [], time.process_time()
    for _ in range(num_calls):
        began_s = time.perf_counter()
        exchange()
        seconds.append(time.perf_counter() - began_s)
    cpu_s = (time.process_time() - began_cpu_s) / num_calls
    return [(call_s, cpu_s) for call_s in seconds]


def measure(carriers: dict[str, Carrier], rank: int, num_members: int, num_bytes: int, seconds: float
            ) -> dict[str, list[tuple[float, float]]]:
    """Return what time_calls() says of all calls of each way. Their number follows from the size, alike on all."""
    sent = torch.full((num_members, num_bytes), rank, dtype=torch.uint8)
    received = torch.zeros_like(sent)
    one_each = [1] * num_members
    num_calls = max(MIN_CALLS, int(seconds / NUM_TURNS / (3e-4 + num_members * num_bytes / 1e9)))
    timings: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}

    def exchange(carrier: Carrier) -> None:
        carrier.all_to_all(received, sent, one_each, one_each, rank)
    for _ in range(NUM_TURNS):
        for way in WAYS:
            received.zero_()
            exchange(carriers[way])     # waits for all
            assert received[:, -1].tolist() == list(range(num_members))
            timings[way] += time_calls(lambda way=way: exchange(carriers[way]), num_calls)  # type: ignore[misc]
    return timings


def member(rank: int, sizes: list[int], seconds: float, rendezvous: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    groups = join_all(rank, rendezvous, pipe)
    carriers = {way: carrier_of(group.rows) for way, group in groups.items()}
    for num_bytes in sizes:
        timings = measure(carriers, rank, groups["Gloo"].num_members, num_bytes, seconds)
        pipe.send({way: tuple(map(statistics.median, zip(*each, strict=True))) for way, each in timings.items()})
    pipe.recv()
    for group in groups.values():
        group.close()


def start_members(target: Callable[..., None], num_members: int,
                  *arguments: object) -> tuple[list[Connection], list[BaseProcess]]:
    """Start target(rank, *arguments, rendezvous, pipe) for each rank, and tell all the addresses of each other."""
    context, rendezvous = multiprocessing.get_context("spawn"), f"tcp://127.0.0.1:{free_port()}"
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    for rank in range(num_members):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=target, args=(rank, *arguments, rendezvous, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    told = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send({way: tuple(addresses[way] for addresses in told) for way in told[0]})
    return pipes, processes


def end_members(pipes: list[Connection], processes: list[BaseProcess]) -> None:
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send("done")
        process.join(TIMEOUT_S)


def run(num_members: int, sizes: list[int], seconds: float) -> list[dict[str, object]]:
    pipes, processes = start_members(member, num_members, sizes, seconds)
    rows: list[dict[str, object]] = []
    for num_bytes in sizes:
        answers = [pipe.recv() for pipe in pipes]
        figures = {way: tuple(round(figure * 1e6, 1) for figure in answers[0][way]) for way in WAYS}
        rows.append({"members": num_members, "bytes": num_bytes, "median_us_and_cpu_us": figures})
        print(f"| {num_members} | {num_bytes:,} | " + " | ".join(f"{figures[way][0]:,} ({figures[way][1]:,})"
                                                              for way in WAYS) + " |", flush=True)
    end_members(pipes, processes)
    return rows


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=numbers, default=[2, 3])
    parser.add_argument("--bytes", type=numbers, default=[4096, 65536, 1 << 20, 16 << 20, 64 << 20])
    parser.add_argument("--seconds", type=float, default=1.0, help="about so long for each size and way")
    options = parser.parse_args()
    print("| members | bytes to each | " + " | ".join(f"{way}, us (CPU us)" for way in WAYS) + " |")
    print("|---" * (2 + len(WAYS)) + "|")
    rows = [row for num_members in options.members for row in run(num_members, options.bytes, options.seconds)]
    print(json.dumps({"benchmark": "transport", **describe(), "results": rows}))


if __name__ == "__main__":
    main()
