"""The servers that served.py compares: each is brought up for a run, and what it started is ended by process id."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml
from startup import DEMO_CONFIG, MOESAIC, bench_config
from unequal import KV_CACHE_BYTES, PROCESS_BYTES

sys.path.insert(0, str(Path(__file__).parent.parent))

from cluster.device.node import free_port  # noqa: E402
from cluster.launch.state_file import read_state  # noqa: E402
from cluster.planner.memory_demand import memory_demand  # noqa: E402
from model.args import read_model_args  # noqa: E402
from serving.config import ServeConfig  # noqa: E402

START_S, END_S = 240.0, 20.0
SPARE = 0.15                    # memory of a shard for copies, over its part of the experts
CONTEXT = 2048


@dataclass(frozen=True)
class Served:
    """A server that answers."""

    doors: dict[str, str]                               # http: URL, grpc: host:port
    facts: dict[str, object] = field(default_factory=dict)     # of the idle server


System = Callable[[], AbstractContextManager[Served]]


# ==== moesaic ====


def shards_config(model: Path, num_shards: int, num_threads: int, num_rows: int) -> ServeConfig:
    """Return the config of equal shards. None of several has memory for all experts; the threads are divided."""
    def content(budget: int | None) -> dict[str, object]:
        return {
            "application": f"served-{num_shards}", "http_port": 0, "proxy_port": free_port(),
            "model": {"path": str(model), "max_model_len": CONTEXT},
            "pools": [{"name": "cpu", "replicas": num_shards, "num_cpus": 0.1, "resources": {"shard": 1},
                       "num_threads": max(1, num_threads // num_shards), "kv_cache": KV_CACHE_BYTES,
                       "memory_budget": budget}],
            "router": {"num_cpus": 0.1, "grpc_port": 0}, "placement": {"num_rows": num_rows, "context_tokens": 192},
            "local_nodes": [{"name": f"n{index}", "num_cpus": 1, "resources": {"shard": 1}}
                            for index in range(num_shards)]}

    free = ServeConfig.model_validate(content(None))
    if num_shards == 1:
        return free
    demand = memory_demand(read_model_args(model), free, num_shards)
    copies = (1 + SPARE) * demand.num_slots / num_shards
    extra = copies * (1 + 1 / demand.num_moe_layers) * demand.expert_bytes     # a change takes a layer's once more
    return ServeConfig.model_validate(content(int(PROCESS_BYTES + demand.fixed_bytes + extra)))


def moesaic(model: Path, num_shards: int, num_threads: int, num_rows: int) -> System:
    @contextlib.contextmanager
    def up() -> Iterator[Served]:
        with tempfile.TemporaryDirectory() as name:
            config = Path(name) / "config.yaml"
            content = shards_config(model, num_shards, num_threads, num_rows).model_dump(mode="json")
            config.write_text(yaml.safe_dump(content), encoding="utf-8")
            with moesaic_up(config, Path(name)) as served:
                yield served

    return up


def demo() -> System:
    """Return the three nodes of examples/demo.yaml."""
    @contextlib.contextmanager
    def up() -> Iterator[Served]:
        from argparse import Namespace

        with tempfile.TemporaryDirectory() as name:
            config = bench_config(Path(name), Namespace(config=DEMO_CONFIG))
            with moesaic_up(config, Path(name)) as served:
                yield served

    return up


@contextlib.contextmanager
def moesaic_up(config: Path, folder: Path) -> Iterator[Served]:
    command = [MOESAIC, "up", config, "--state-dir", folder / "state"]
    try:
        subprocess.run(command, check=True, timeout=START_S, stdout=sys.stderr)
        running = read_state(folder / "state")
        yield Served({"http": running.http_url, "grpc": running.grpc_address}, facts_of(folder / "state"))
    finally:
        subprocess.run([MOESAIC, "down", "--state-dir", folder / "state"], timeout=2 * END_S, stdout=sys.stderr)


def facts_of(state_dir: Path) -> dict[str, object]:
    """Return memory, roles and links of the idle shards, by rank of what `moesaic status --json` says."""
    done = subprocess.run([MOESAIC, "status", "--json", "--state-dir", state_dir], check=True, timeout=60,
                          capture_output=True, text=True)
    status = json.loads(done.stdout.splitlines()[-1])
    epoch = status["view"]["epoch"]
    shards = [reported for _, reported in status["shards"]]
    links = [(member["profile"] or {}).get("link") for member, _ in status["shards"]]
    return {
        "request_shares": [round(share["fraction"], 3) for share in epoch["shares"]],
        "expert_copies": [shard["num_expert_copies"] for shard in shards],
        "resident_bytes": [shard["resident_bytes"] for shard in shards],
        "weights_bytes": [shard["weights_bytes"] for shard in shards],
        "kv_cache_bytes": [shard["kv_cache_bytes"] for shard in shards],
        "link_latency_us": [round(link["latency_s"] * 1e6, 1) if link else None for link in links]}


# ==== vLLM ====


def vllm(model: Path, python: str, num_threads: int) -> System:
    @contextlib.contextmanager
    def up() -> Iterator[Served]:
        port = free_port()
        command = [python, "-P", "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--dtype", "bfloat16",
                   "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(CONTEXT),
                   "--max-num-batched-tokens", "2048", "--enable-prompt-tokens-details"]
        environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "1",
                                    "OMP_NUM_THREADS": str(num_threads), "VLLM_NO_USAGE_STATS": "1",
                                    "HF_HUB_OFFLINE": "1"}
        with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
            process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            try:
                url = f"http://127.0.0.1:{port}"
                try:
                    wait_until_healthy(url, process)
                except RuntimeError:
                    log.seek(0)
                    print(log.read()[-3000:], file=sys.stderr)
                    raise
                yield Served({"http": url})
            finally:
                end(process)

    return up


def wait_until_healthy(url: str, process: psutil.Popen) -> None:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
            return
        time.sleep(0.5)
    raise RuntimeError(f"vllm serve did not answer: its exit code is {process.poll()}")


def end(process: psutil.Popen) -> None:
    """Ask the process to end, then end it and what it started that is left."""
    if process.poll() is None:
        found = [process, *process.children(recursive=True)]
        process.terminate()
        _, left = psutil.wait_procs(found, timeout=END_S)
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(left, timeout=END_S)
