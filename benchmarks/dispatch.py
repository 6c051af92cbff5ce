"""Time and bytes of one MoE layer's dispatch and combine between processes of this machine, experts left out.

`python benchmarks/dispatch.py [--backend transport|gloo] [--members 2,3,4] [--rows 1,8,64,512,2048] [--hidden 1024]
[--copied 0]`. Experts are spread evenly, so many of them on a second member too; tokens choose uniformly. A row of the
table is one (members, rows of each member, hidden size); for each dispatcher it has the time of a layer on the slowest
member (first quartile: what else runs on the machine only adds), and the bytes that left all members beside the least
possible: every row once to each other member that needs it, every (row, expert) output once to another owner.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import describe  # noqa: E402
from cluster.device.node import free_port  # noqa: E402
from cluster.shard.process_group import Backend, Meeting, ProcessGroup  # noqa: E402
from model.dispatch.carriers import RowGroup  # noqa: E402
from model.dispatch.dispatcher import Dispatcher  # noqa: E402
from model.dispatch.row_plan import choose_holders, layer_routing  # noqa: E402
from model.kernels.select import select_kernels  # noqa: E402
from model.placement import ExpertRate, Placement  # noqa: E402
from model.transport.endpoint import Endpoint  # noqa: E402

NAMES = ("all_to_all", "gather", "gather_fixed", "auto")
TIMEOUT_S = 120.0
WARM_UP = 3


@dataclass(frozen=True)
class Setting:
    rows_of_member: tuple[int, ...]
    hidden_size: int
    num_experts: int
    num_experts_per_token: int
    num_copied: int                 # experts with a second holder
    layers: int                     # repetitions: one layer each

    @property
    def placement(self) -> Placement:
        return placement_with_copies(len(self.rows_of_member), self.num_experts, self.num_copied)

    def expert_ids(self, rank: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(rank)
        scores = torch.rand(self.rows_of_member[rank], self.num_experts, generator=random)
        return scores.topk(self.num_experts_per_token).indices.sort(dim=1).values


@dataclass
class Result:
    members: int
    rows_of_member: tuple[int, ...]
    hidden_size: int
    least_bytes: int
    ms_per_layer: dict[str, float] = field(default_factory=dict)
    bytes_per_layer: dict[str, int] = field(default_factory=dict)


def placement_with_copies(num_members: int, num_experts: int, num_copied: int,
                          rates: tuple[ExpertRate, ...] = ()) -> Placement:
    """Return the placement of one layer: expert e on member e mod M, the first `num_copied` also on another one."""
    seconds = [(expert + 1 + expert // num_members % max(num_members - 1, 1)) % num_members
               for expert in range(num_copied)]
    holders = [{expert % num_members, *seconds[expert:expert + 1]} for expert in range(num_experts)]
    return Placement(num_members, (tuple(tuple(sorted(ranks)) for ranks in holders),), rates)


def least_bytes(setting: Setting) -> int:
    """Return the bytes that the split which the dispatchers choose must send."""
    members = range(len(setting.rows_of_member))
    ids = np.concatenate([setting.expert_ids(owner).numpy().astype(np.int16) for owner in members])
    owners = np.repeat(members, setting.rows_of_member)
    holders = choose_holders(layer_routing(setting.placement, 0, 0), ids, owners)
    rows = sum(len(set(row) - {owner}) + sum(holder != owner for holder in row)
               for owner, row in zip(owners.tolist(), holders.tolist(), strict=True))
    return rows * setting.hidden_size * torch.bfloat16.itemsize


def dispatchers(setting: Setting, rank: int, group: RowGroup) -> dict[str, Dispatcher]:
    from model.dispatch.all_to_all import AllToAllDispatcher
    from model.dispatch.auto import AutoDispatcher
    from model.dispatch.exchange import RowExchange
    from model.dispatch.gather import GatherDispatcher

    def exchange() -> RowExchange:
        return RowExchange(select_kernels("cpu", 1), setting.placement, rank, group)
    return {"all_to_all": AllToAllDispatcher(exchange()),
            "gather": GatherDispatcher(exchange()),
            "gather_fixed": GatherDispatcher(exchange(), fixed_shapes=True),
            "auto": AutoDispatcher(exchange())}


def measure(setting: Setting, dispatchers: dict[str, Dispatcher], rank: int) -> dict[str, tuple[float, int]]:
    """Return (first quartile of the seconds, bytes sent) of a layer on this member. The dispatchers take turns."""
    expert_ids = setting.expert_ids(rank)
    x = torch.randn(len(expert_ids), setting.hidden_size).to(torch.bfloat16)
    weights = torch.rand(expert_ids.shape)
    seconds: dict[str, list[float]] = {name: [] for name in dispatchers}
    num_bytes: dict[str, int] = {}
    for _ in range(setting.layers + WARM_UP):
        for name, dispatcher in dispatchers.items():
            before = dispatcher.bytes_sent
            start = time.perf_counter()
            dispatcher.begin_step(setting.rows_of_member)
            rows, handle = dispatcher.dispatch(0, x, expert_ids)
            dispatcher.combine(0, rows, weights, handle)
            seconds[name].append(time.perf_counter() - start)
            num_bytes[name] = dispatcher.bytes_sent - before
    return {name: (statistics.quantiles(seconds[name][WARM_UP:], n=4)[0], num_bytes[name]) for name in dispatchers}


def member(rank: int, backend: Backend, rendezvous: str, settings: list[Setting], pipe: Connection) -> None:
    endpoint = Endpoint("127.0.0.1")
    pipe.send(endpoint.address)
    group = ProcessGroup.join(endpoint, Meeting(1, pipe.recv(), rendezvous), rank, TIMEOUT_S, backend, "cpu")
    for setting in settings:
        pipe.send(measure(setting, dispatchers(setting, rank, group.rows), rank))
    group.close()
    endpoint.close()


def run_members(settings: list[Setting], num_members: int, backend: Backend) -> list[Result]:
    rendezvous = f"tcp://127.0.0.1:{free_port()}"
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(num_members):
        ours, theirs = context.Pipe()
        process = context.Process(target=member, args=(rank, backend, rendezvous, settings, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    addresses = tuple(pipe.recv() for pipe in pipes)
    for pipe in pipes:
        pipe.send(addresses)
    results = [collect(setting, pipes) for setting in settings]
    for process in processes:
        process.join(TIMEOUT_S)
    return results


def collect(setting: Setting, pipes: list[Connection]) -> Result:
    answers = [pipe.recv() for pipe in pipes]
    result = Result(len(pipes), setting.rows_of_member, setting.hidden_size, least_bytes(setting))
    for name in NAMES:
        result.ms_per_layer[name] = round(max(answer[name][0] for answer in answers) * 1e3, 3)
        result.bytes_per_layer[name] = sum(answer[name][1] for answer in answers)
    print_row(result)
    return result


def print_row(result: Result) -> None:
    times = " | ".join(f"{result.ms_per_layer[name]:.2f}" for name in NAMES)
    ratios = " | ".join(f"{result.bytes_per_layer[name] / max(result.least_bytes, 1):.2f}" for name in NAMES)
    rows = "+".join(map(str, result.rows_of_member))
    print(f"| {result.members} | {rows} | {result.hidden_size} | {times} | {result.least_bytes / 1e6:.3f} | {ratios} |",
          flush=True)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("transport", "gloo"), default="transport")
    parser.add_argument("--members", type=numbers, default=[2, 3, 4])
    parser.add_argument("--rows", type=numbers, default=[1, 8, 64, 512, 2048], help="of each member")
    parser.add_argument("--hidden", type=numbers, default=[1024])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--experts-per-token", type=int, default=8)
    parser.add_argument("--copied", type=int, default=0, help="experts that have a second copy")
    parser.add_argument("--skewed", action="store_true", help="also: one member has all the rows, the others one each")
    options = parser.parse_args()
    print("| members | rows | hidden | " + " | ".join(f"{name} ms" for name in NAMES) + " | least MB | "
          + " | ".join(f"{name} x least" for name in NAMES) + " |")
    print("|---" * (4 + 2 * len(NAMES)) + "|")
    results: list[Result] = []
    for num_members in options.members:
        batches = [(rows,) * num_members for rows in options.rows]
        if options.skewed:
            batches += [(rows,) + (1,) * (num_members - 1) for rows in options.rows if rows > 1]
        settings = [Setting(batch, hidden, options.experts, options.experts_per_token, options.copied,
                            100 if max(batch) <= 64 else 12)
                    for hidden in options.hidden for batch in batches]
        results += run_members(settings, num_members, options.backend)
    print(json.dumps({"benchmark": "dispatch", "backend": options.backend, "dtype": "bfloat16",
                      "experts": options.experts, "copied": options.copied,
                      "experts_per_token": options.experts_per_token, **describe(),
                      "results": [asdict(result) for result in results]}))


if __name__ == "__main__":
    main()
