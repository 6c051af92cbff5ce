"""From `moesaic up` to the first token, beside its floor: an empty Serve application on the same local nodes.

Both are timed from the start of the command's process, in turns, in one run:

* up: `moesaic up` with the demo model (weights included); when it says that it answers, one streamed chat; ends with
  its first text over HTTP
* floor: a process that starts three Ray nodes, deploys an application of one function and ends with its first HTTP 200.
  `ray` does that with Ray's own means (ray.cluster_utils, serve.run); `plain` and `overlapped` with the node starter of
  `up`, which leaves out parts of Ray that nobody here needs: one after the other, or beside each other and the imports

  python benchmarks/startup.py --repeats 3
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import platformdirs
import yaml
from machine import describe

from cluster.device.node import free_port
from serving.config import ServeConfig, load_config

DEMO_CONFIG = Path(__file__).parent.parent / "examples" / "demo.yaml"
MOESAIC = Path(sys.executable).with_name("moesaic")
FLOORS = ("ray", "plain", "overlapped")
TIMEOUT_S = 300.0
QUESTION = "Why is the sky blue?"


# ==== the floor, in a process of its own ====


def run_floor(config: ServeConfig, kind: str, began_s: float) -> None:
    """Bring the empty application up, print the moments as JSON, wait for a line on stdin, and stop it all."""
    marks = {"python_started": time.monotonic() - began_s}

    def mark(name: str) -> None:
        marks[name] = time.monotonic() - began_s

    from cluster.launch.local_nodes import LocalNodes
    from cluster.launch.process_marks import stop_processes

    nodes = LocalNodes()
    head, *others = config.local_nodes
    mark("imported")
    beside = threading.Thread(target=nodes.start_others, args=(others, lambda name: None))
    try:
        imports = threading.Thread(target=__import__, args=("ray.serve",))
        if kind == "overlapped":
            imports.start()
        nodes.start_head(head)
        mark("head_started")
        beside.start()
        if kind == "plain":
            beside.join()
            mark("all_nodes_started")
        deploy_empty(config, nodes.address)
        mark("deployed")
        wait_for_http(config.http_port)
        beside.join()
        mark("first_answer")
        print(json.dumps(marks), flush=True)
        sys.stdin.readline()
    finally:
        if beside.ident is not None:
            beside.join()
        stop_processes(nodes.marks())


def run_ray_floor(config: ServeConfig, began_s: float) -> None:
    """Do the same with what Ray has for it."""
    marks = {"python_started": time.monotonic() - began_s}
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    marks["imported"] = time.monotonic() - began_s
    head, *others = config.local_nodes
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head.num_cpus, "include_dashboard": False})
    try:
        for other in others:
            cluster.add_node(num_cpus=other.num_cpus)
        cluster.wait_for_nodes()
        marks["all_nodes_started"] = time.monotonic() - began_s
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

        @serve.deployment
        class Empty:
            def __call__(self) -> str:
                return "here"

        serve.start(http_options={"host": config.http_host, "port": config.http_port})
        serve.run(Empty.bind())
        marks["deployed"] = time.monotonic() - began_s
        wait_for_http(config.http_port)
        marks["first_answer"] = time.monotonic() - began_s
        print(json.dumps(marks), flush=True)
        sys.stdin.readline()
    finally:
        ray.shutdown()
        cluster.shutdown()


def deploy_empty(config: ServeConfig, address: str) -> None:
    import ray
    from ray import serve

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")

    @serve.deployment
    class Empty:
        def __call__(self) -> str:
            return "here"

    serve.start(proxy_location="HeadOnly", http_options={"host": config.http_host, "port": config.http_port})
    serve.run_many([serve.RunTarget(Empty.bind(), "empty", "/")], wait_for_ingress_deployment_creation=False,
                   wait_for_applications_running=False)


def wait_for_http(port: int) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
        try:
            connection.request("GET", "/")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.02)
    raise SystemExit(f"nothing answered on port {port} within {TIMEOUT_S:.0f} s")


def time_floor(config_path: Path, kind: str) -> dict[str, float]:
    began_s = time.monotonic()
    command = [sys.executable, __file__, "--config", str(config_path), "--floor-once", kind, "--began-s", str(began_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True) as process:
        assert process.stdout is not None
        marks: dict[str, float] = json.loads(first_json_line(process.stdout))
        process.communicate("stop\n", timeout=TIMEOUT_S)
    return marks


def first_json_line(lines: Iterable[str]) -> str:
    for line in lines:
        if line.startswith("{"):
            return line
    raise SystemExit("the process ended without an answer: run it with --floor-once to see why")


# ==== moesaic up ====


def time_up(config_path: Path, config: ServeConfig, state_dir: Path) -> dict[str, float]:
    began_s = time.monotonic()
    command = [MOESAIC, "up", config_path, "--state-dir", state_dir]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if not any("answers at" in line for line in process.stdout):
            raise SystemExit("moesaic up failed, see above")
        up_s = time.monotonic() - began_s
        first_token(config)
        return {"up_answers": up_s, "first_token": time.monotonic() - began_s}
    finally:
        process.communicate(timeout=TIMEOUT_S)
        subprocess.run([MOESAIC, "down", "--state-dir", state_dir], stdout=subprocess.DEVNULL, timeout=TIMEOUT_S,
                       check=True)


def first_token(config: ServeConfig) -> None:
    """Return when the first text of a streamed chat has come."""
    connection = http.client.HTTPConnection("127.0.0.1", config.http_port, timeout=TIMEOUT_S)
    body = {"model": config.model.served_name, "messages": [{"role": "user", "content": QUESTION}], "stream": True,
            "max_tokens": 8, "temperature": 0}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"HTTP {response.status}: {response.read(500)!r}")
    for line in iter(response.readline, b""):
        if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
            return
    raise SystemExit("the answer had no text")


# ==== where the time of `moesaic up` goes: the same code, in a process of its own, with its progress noted ====


def run_up(config: ServeConfig, state_dir: Path, began_s: float) -> None:
    marks = {"python_started": time.monotonic() - began_s}

    def mark(name: str) -> None:
        marks.setdefault(name, time.monotonic() - began_s)

    from cluster.coordinator.view import ShardState
    from cluster.launch.bring_up import BringUp, Progress, take_down

    mark("imported")
    num_shards = config.num_shards

    def note(progress: Progress) -> None:
        mark(f"stage: {progress.stage}")
        if progress.nodes:
            mark(f"nodes: {len(progress.nodes)}")
        if progress.status is not None:
            states = [status.state for _, status in progress.status.shards]
            mark(f"shards registered: {len(states)}")
            for name, reached in (("loading", (ShardState.LOADING, ShardState.LOADED, ShardState.JOINING,
                                               ShardState.READY)),
                                  ("loaded", (ShardState.LOADED, ShardState.JOINING, ShardState.READY)),
                                  ("ready", (ShardState.READY,))):
                if len(states) == num_shards and all(state in reached for state in states):
                    mark(f"all shards {name}")

    running = BringUp(config, state_dir, note).run()
    try:
        mark("up returned")
        first_token(config)
        mark("first token")
        print(json.dumps(marks))
    finally:
        take_down(running, state_dir)


def time_breakdown(config_path: Path, state_dir: Path) -> dict[str, float]:
    began_s = time.monotonic()
    command = [sys.executable, __file__, "--config", str(config_path), "--up-once", str(state_dir),
               "--began-s", str(began_s)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
    marks: dict[str, float] = json.loads(first_json_line(done.stdout.splitlines()))
    return marks


# ==== the comparison ====


def bench_config(folder: Path, options: argparse.Namespace) -> Path:
    """Return the demo's config with free ports, its checkpoint, and a name of its own."""
    from model.demo_checkpoint import ensure_demo_checkpoint

    checkpoint = ensure_demo_checkpoint(platformdirs.user_cache_path("moesaic"))
    content = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    content.update(application="startup-bench", http_port=free_port(), proxy_port=free_port())
    content["model"]["path"] = str(checkpoint)
    content["router"]["grpc_port"] = free_port()
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def compare(options: argparse.Namespace) -> dict[str, object]:
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ("up", *FLOORS)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config_path = bench_config(folder, options)
        config = load_config(config_path)
        warm(Path(config.model.path))
        for repeat in range(options.repeats):
            order = list(runs) if repeat % 2 == 0 else list(reversed(runs))
            for kind in order:
                marks = time_up(config_path, config, folder) if kind == "up" else time_floor(config_path, kind)
                runs[kind].append(marks)
                print(f"{kind}: {max(marks.values()):.1f} s", file=sys.stderr)
        breakdown = time_breakdown(config_path, folder)
    up_s = statistics.median(run["first_token"] for run in runs["up"])
    floors_s = {kind: statistics.median(run["first_answer"] for run in runs[kind]) for kind in FLOORS}
    return {"up_to_first_token_s": up_s, "floor_s": floors_s,
            "ratio": {kind: up_s / floor_s for kind, floor_s in floors_s.items()},
            "breakdown_s": breakdown, "runs": runs}


def warm(folder: Path) -> None:
    """Read the weights once, so that no run pays for a cold page cache; the first run would."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as content:
            while content.read(1 << 24):
                pass


def rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEMO_CONFIG)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--floor-once", choices=FLOORS, help=argparse.SUPPRESS)
    parser.add_argument("--up-once", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began-s", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.floor_once == "ray":
        run_ray_floor(load_config(options.config), options.began_s or time.monotonic())
    elif options.floor_once:
        run_floor(load_config(options.config), options.floor_once, options.began_s or time.monotonic())
    elif options.up_once:
        run_up(load_config(options.config), options.up_once, options.began_s or time.monotonic())
    else:
        result = compare(options)
        for name, moment_s in sorted(result["breakdown_s"].items(), key=lambda item: item[1]):
            print(f"{moment_s:7.2f} s  {name}")
        print(json.dumps(rounded({"benchmark": "startup", **result, "machine": describe()})))


if __name__ == "__main__":
    main()
