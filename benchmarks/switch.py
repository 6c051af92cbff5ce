"""The gap that a change of placement makes in running streams.

Some streams decode on equal shards of a local cluster while the placement goes back and forth between two that differ
in every layer. Of each change: the longest time between two tokens of any stream while it was prepared and made, beside
the median step. The last line of stdout is one JSON object.

  python benchmarks/switch.py --changes 6
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from machine import describe
from make_checkpoint import default_dir, make
from unequal import prompts_of

sys.path.insert(0, str(Path(__file__).parent.parent))

from cluster.coordinator.placement_change import find  # noqa: E402
from cluster.device.node import free_port
from cluster.launch.bring_up import BringUp, take_down  # noqa: E402
from cluster.launch.cluster_client import ClusterClient  # noqa: E402
from cluster.launch.state_file import RunningCluster  # noqa: E402
from model.placement import Placement  # noqa: E402
from serving.config import ServeConfig, parse_config  # noqa: E402
from serving.link.channel_options import DIRECT  # noqa: E402
from serving.link.epoch import PlacementChange  # noqa: E402
from serving.proto import inference_pb2, inference_pb2_grpc  # noqa: E402

SETTLE_S = 3.0


@dataclass
class Streams:
    """Endless streams in a thread of their own; when the latest token of each came, and every gap with its end."""

    address: str
    model: str
    num: int
    gaps: list[tuple[float, float]] = field(default_factory=list)      # (when it ended, seconds)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)
        self._thread.start()

    async def _run(self) -> None:
        async with grpc.aio.insecure_channel(self.address, options=DIRECT) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            await asyncio.gather(*(self._stream(stub, prompt) for prompt in prompts_of(self.num, 16, 1)))

    async def _stream(self, stub: inference_pb2_grpc.InferenceStub, prompt: list[int]) -> None:
        while True:
            request = inference_pb2.GenerateRequest(
                model=self.model, token_ids=inference_pb2.TokenIds(ids=prompt),
                sampling=inference_pb2.Sampling(max_tokens=1900, ignore_eos=True, seed=prompt[0]))
            latest_s = None
            try:
                async for _ in stub.Generate(request, timeout=600.0):
                    now_s = time.monotonic()
                    if latest_s is not None:
                        self.gaps.append((now_s, now_s - latest_s))
                    latest_s = now_s
            except grpc.aio.AioRpcError as error:
                self.errors.append(str(error.details()))
                return

    def between(self, begin_s: float, end_s: float) -> list[float]:
        return [gap_s for at_s, gap_s in list(self.gaps) if begin_s <= at_s <= end_s]


def config_of(options: argparse.Namespace) -> ServeConfig:
    names = [f"n{index}" for index in range(options.members)]
    return parse_config({
        "application": "switch", "http_port": free_port(), "proxy_port": free_port(),
        "model": {"path": str(default_dir(options.model)), "name": options.model, "max_model_len": 2048},
        "pools": [{"name": "cpu", "replicas": options.members, "num_cpus": 0.1, "num_threads": 1,
                   "resources": {"shard": 1}, "kv_cache": "256MB"}],
        "router": {"num_cpus": 0.1, "grpc_port": free_port()},
        "placement": {"rebalance_margin": None},
        "local_nodes": [{"name": name, "num_cpus": 1, "resources": {"shard": 1}} for name in names]})


def two_placements(num_layers: int, num_experts: int, members: int) -> list[Placement]:
    return [Placement(members, (tuple(((expert + turn) % members,) for expert in range(num_experts)),) * num_layers)
            for turn in range(2)]


def change(client: ClusterClient, name: str, placement: Placement) -> PlacementChange:
    made = client.change_placement(name, "benchmark", placement)
    while made.state == "running":
        time.sleep(0.05)
        found = find(client.placement().epoch, name)
        assert found is not None
        made = found
    return made


def measure(options: argparse.Namespace, running: RunningCluster) -> list[dict[str, float]]:
    streams = Streams(running.grpc_address, options.model, options.streams)
    found = []
    with ClusterClient.connected(running) as client:
        layers = client.placement().epoch.placement.holders
        placements = two_placements(len(layers), len(layers[0]), options.members)
        change(client, "first", placements[0])
        for number in range(options.changes):
            time.sleep(SETTLE_S)
            begin_s = time.monotonic()
            made = change(client, f"turn-{number}", placements[(number + 1) % 2])
            end_s = time.monotonic() + 1.0
            time.sleep(1.0)
            if made.state != "done" or streams.errors:
                raise SystemExit(f"change {made.state}: {made.detail}; streams that failed: {streams.errors}")
            quiet = streams.between(begin_s - SETTLE_S + 0.5, begin_s)
            found.append({"took_s": end_s - 1.0 - begin_s,
                          "revisions": made.last_revision - made.first_revision, "moved_bytes": made.moved_bytes,
                          "median_step_s": statistics.median(quiet), "longest_quiet_gap_s": max(quiet),
                          "longest_gap_s": max(streams.between(begin_s, end_s))})
            print(found[-1], file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="of make_checkpoint.py")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--streams", type=int, default=12)
    parser.add_argument("--changes", type=int, default=6)
    options = parser.parse_args()
    if not default_dir(options.model).exists():
        make(options.model, default_dir(options.model), 0)
    with tempfile.TemporaryDirectory() as folder:
        running = BringUp(config_of(options), Path(folder), lambda progress: None).run()
        try:
            changes = measure(options, running)
        finally:
            take_down(running, Path(folder))
    beyond_s = [entry["longest_gap_s"] - entry["median_step_s"] for entry in changes]
    print(f"beyond one step: median {statistics.median(beyond_s) * 1e3:.0f} ms, longest {max(beyond_s) * 1e3:.0f} ms")
    print(json.dumps({"benchmark": "switch", "model": options.model, "members": options.members,
                      "streams": options.streams, "changes": changes, "beyond_one_step_s": beyond_s,
                      "machine": describe()}))


if __name__ == "__main__":
    main()
