"""`moesaic doctor`: every check says what it found and, when that is not good, what to change."""

from __future__ import annotations

import datetime
import enum
import importlib.metadata
import multiprocessing
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from packaging.requirements import Requirement

from cluster.device.facts import num_threads_of
from cluster.device.file_limit import bounded_by_files, raise_file_limit
from cluster.device.host_limits import host_cpus, host_memory
from cluster.device.node import host_and_port, port_fault
from cluster.launch.interruption import children_unaware
from serving.config import AdmissionConfig, ServeConfig
from serving.link.epoch import DeviceProfile

ROUND_TRIP_TIMEOUT_S = 60.0
_NUM_ROUND_TRIPS = 50
_MIN_SHARED_MEMORY_BYTES = 1 << 30      # below it Ray spills its object store to disk


class Verdict(enum.StrEnum):
    OK = "ok"
    WARN = "warn"       # it will run; something will be slower or smaller than it could be
    FAIL = "fail"       # `moesaic up` would not come to serve


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    verdict: Verdict
    found: str
    fix: str = ""


def run_checks(config: ServeConfig | None) -> Iterator[Check]:
    """Yield one after the other, so that they can be shown as they come. A check that breaks is a failed check.

    Without a config only what every config needs is looked at.
    """
    checks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", _python), ("packages", _packages), ("CPU kernels", _cpu_kernels), ("address", _address),
        ("limits", _limits), ("shared memory", _shared_memory), ("collective", _collective_round_trip)]
    if config is not None:
        checks += [("ports", lambda: _ports(config)), ("certificates", lambda: _certificates(config)),
                   ("devices", lambda: _devices(config)), ("checkpoint", lambda: _checkpoint(config)),
                   ("memory", lambda: _memory(config)), ("device speed", lambda: _device_speed(config))]
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:      # whatever broke is what the user came to hear about
            yield Check(name, Verdict.FAIL, f"{type(error).__name__}: {error}", getattr(error, "fix", ""))


def _python() -> Iterator[Check]:
    good = sys.version_info >= (3, 11)
    yield Check("python", Verdict.OK if good else Verdict.FAIL, platform.python_version(),
                "" if good else "install Python 3.11 or newer and make a new virtual environment")


def _packages() -> Iterator[Check]:
    """Compare every requirement that pyproject.toml states with what is installed."""
    for line in importlib.metadata.requires("moesaic") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(requirement.name, Verdict.FAIL, "not installed", f"pip install '{requirement}'")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        if not fits or requirement.name in ("ray", "torch", "deepspeed"):
            yield Check(requirement.name, Verdict.OK if fits else Verdict.FAIL, version,
                        "" if fits else f"pip install '{requirement}'")


def _cpu_kernels() -> Iterator[Check]:
    from model.kernels.select import select_kernels

    name = select_kernels("cpu", 1).name
    packed = name == "packed-cpu"
    yield Check("CPU kernels", Verdict.OK if packed else Verdict.WARN, name,
                "" if packed else "pip install moesaic again (it compiles model/kernels): plain torch is several times "
                                  "slower, and its numbers differ from those of nodes with packed kernels")


def _address() -> Iterator[Check]:
    """Other nodes reach this one by the address that Ray announces."""
    import ray.util

    address = str(ray.util.get_node_ip_address())
    loopback = address.startswith("127.") or address == "::1"
    yield Check("address", Verdict.WARN if loopback else Verdict.OK, f"Ray announces {address}",
                "other machines cannot reach a loopback address: start Ray with --node-ip-address" if loopback else "")


def _limits() -> Iterator[Check]:
    """Say how much this machine, or its container, lets programs have."""
    memory, cpus, num_files = host_memory(), host_cpus(), raise_file_limit()
    yield Check("host memory", Verdict.OK, f"{memory.available_bytes / 2**30:.1f} of {memory.total_bytes / 2**30:.1f} "
                f"GiB available{_limited_by(memory.limited_by)}")
    yield Check("host CPUs", Verdict.OK, f"{cpus.num_cpus}{_limited_by(cpus.limited_by)}")
    good = bounded_by_files(AdmissionConfig(), num_files, 1) == AdmissionConfig()
    yield Check("open files", Verdict.OK if good else Verdict.WARN, f"up to {num_files:,} a process",
                "" if good else "each connection takes one: raise the hard limit (ulimit -Hn; LimitNOFILE of systemd; "
                                "--ulimit nofile of docker), or admission is bounded by it")


def _limited_by(path: str) -> str:
    return f", limited by {path}" if path else ""


def _shared_memory() -> Iterator[Check]:
    path = Path("/dev/shm")
    if not path.is_dir():
        return
    free = shutil.disk_usage(path).free
    good = free >= _MIN_SHARED_MEMORY_BYTES
    yield Check("shared memory", Verdict.OK if good else Verdict.WARN, f"{free / 2**30:.1f} GiB free in /dev/shm",
                "" if good else "give the container a larger /dev/shm (Kubernetes: an emptyDir with medium Memory)")


def _collective_round_trip() -> Iterator[Check]:
    """Two processes of this machine form a group, as shards do, and agree on steps."""
    context = multiprocessing.get_context("spawn")
    with children_unaware():        # of its own: it starts multiprocessing's resource tracker, which changes the mask
        seconds = context.Value("d", -1.0)
    pipes = context.Pipe()
    processes = [context.Process(target=_agree_many_times, args=(pipes[rank], rank, seconds), daemon=True)
                 for rank in range(2)]
    try:
        with children_unaware():
            for process in processes:
                process.start()
        for process in processes:
            process.join(ROUND_TRIP_TIMEOUT_S)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    if seconds.value < 0:
        yield Check("collective", Verdict.FAIL, "two local processes could not form a group",
                    "their error is above; a sandbox that forbids memfd or Unix sockets is the usual reason")
        return
    yield Check("collective", Verdict.OK, f"{seconds.value * 1e3:.3f} ms for two local processes to agree")


def _agree_many_times(other: Connection, rank: int, seconds: object) -> None:
    from cluster.shard.process_group import Meeting, ProcessGroup
    from model.step import StepHeader
    from model.transport.endpoint import Endpoint

    endpoint = Endpoint("127.0.0.1")
    other.send(endpoint.address)
    members = (endpoint.address, other.recv())
    group = ProcessGroup.join(endpoint, Meeting(1, members if rank == 0 else members[::-1], ""), rank,
                              ROUND_TRIP_TIMEOUT_S, "transport", "cpu")
    group.agree(StepHeader(epoch_number=1, step_index=0, num_tokens=0))
    began_s = time.perf_counter()
    for step in range(_NUM_ROUND_TRIPS):
        group.agree(StepHeader(epoch_number=1, step_index=1 + step, num_tokens=0))
    if rank == 0:
        seconds.value = (time.perf_counter() - began_s) / _NUM_ROUND_TRIPS  # type: ignore[attr-defined]
    group.close()
    endpoint.close()


def _ports(config: ServeConfig) -> Iterator[Check]:
    doors = (("HTTP", "http_port", config.http_host, config.http_port),
             ("gRPC", "router.grpc_port", config.http_host, config.router.grpc_port),
             ("proxy", "proxy_port", config.proxy_host, config.proxy_port))
    for what, key, host, port in doors:
        if not port:
            continue
        fault = port_fault(host, port)
        if fault is not None:
            yield Check(f"{what} port", Verdict.FAIL, f"{host_and_port(host, port)}: {fault}",
                        f"stop what listens there (moesaic down?), or set {key} to another port")
            continue
        yield Check(f"{what} port", Verdict.OK, f"{port} is free")


def _certificates(config: ServeConfig) -> Iterator[Check]:
    from cluster.cli.certificate_check import certificate_checks

    yield from certificate_checks(config, datetime.datetime.now(datetime.UTC))


def _devices(config: ServeConfig) -> Iterator[Check]:
    num_cpus = host_cpus().num_cpus
    for pool in config.pools:
        if pool.device == "cpu" and num_threads_of(pool) > num_cpus:
            yield Check("threads", Verdict.WARN, f"pool {pool.name}: {num_threads_of(pool)} threads on {num_cpus} CPUs",
                        "lower num_threads: threads that share a CPU wait for each other in every layer")
    if not any(pool.device == "cuda" for pool in config.pools):
        yield Check("devices", Verdict.OK, f"{host_cpus().num_cpus} CPUs; no pool asks for a GPU")
        return
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        yield Check("devices", Verdict.OK, names)
    else:
        yield Check("devices", Verdict.WARN, "no GPU on this machine, but a pool has device: cuda",
                    "run the doctor on a GPU node; if this is one, check its driver and a CUDA build of torch")


def _checkpoint(config: ServeConfig) -> Iterator[Check]:
    from cluster.device.model_store import locate_checkpoint
    from model.checkpoint import Checkpoint
    from serving.served_model import read_served_model

    folder = locate_checkpoint(config.model, "facts")
    served = read_served_model(folder, config.model)
    args = served.args
    yield Check("checkpoint", Verdict.OK, f"{folder.name}: {args.num_layers} layers, {args.num_moe_layers} of them "
                                          f"with {args.num_experts} experts, top {args.num_experts_per_tok}; "
                                          f"{served.max_model_len} tokens of context")
    for note in served.notes:
        yield Check("checkpoint", Verdict.WARN, note.found, note.fix)
    if "://" in config.model.path:
        yield Check("weights", Verdict.WARN, "not looked at", "they are fetched from the hub when shards start")
        return
    with Checkpoint(folder) as checkpoint:
        yield Check("weights", Verdict.OK, f"{len(checkpoint.tensors)} tensors")


def _device_speed(config: ServeConfig) -> Iterator[Check]:
    """Measure as shards on this machine would when they start, or find it measured. A noisy one is measured again."""
    import torch

    from cluster.device.model_store import locate_checkpoint
    from cluster.device.profile import profile_device, profile_facts
    from cluster.device.profile_store import ProfileStore, default_profile_dir
    from model.args import read_model_args
    from model.kernels.select import select_kernels

    args, dtype = read_model_args(locate_checkpoint(config.model, "facts")), config.model.dtype
    store = ProfileStore(default_profile_dir())
    for pool in config.pools:
        if pool.device == "cuda" and not torch.cuda.is_available():
            continue
        kernels = select_kernels("cpu" if pool.device == "cpu" else "cuda:0", num_threads_of(pool))
        kept = store.read(profile_facts(args, dtype, kernels))
        profile = profile_device(args, dtype, kernels, pool, store, settles=True)
        is_kept = kept is not None and not kept.profile.is_noisy
        noise = f"repeats differ by {profile.spread:.1%}"
        yield Check("device speed", Verdict.WARN if profile.is_noisy else Verdict.OK,
                    f"pool {pool.name}: {speed_text(profile)}; {noise}; {'kept' if is_kept else 'measured now'}",
                    "other programs run here: stop them and repeat this command" if profile.is_noisy else "")


def speed_text(profile: DeviceProfile) -> str:
    """Return '20.0 GB/s, 20 / 150 / 200 GFLOP/s at 1 / 64 / 256 rows', and whether that is emulated."""
    rates = dict(profile.gemm_flop_per_s)
    shown: list[int] = [rows for rows in (1, 64, 256) if rows in rates]
    text = (f"{profile.read_bytes_per_s / 1e9:.1f} GB/s, {' / '.join(f'{rates[rows] / 1e9:.0f}' for rows in shown)} "
            f"GFLOP/s at {' / '.join(map(str, shown))} rows")
    return text if profile.emulated_speed is None else f"{text} (emulated {profile.emulated_speed:g})"


def _memory(config: ServeConfig) -> Iterator[Check]:
    from cluster.cli.memory_check import memory_checks, this_machine
    from cluster.device.model_store import locate_checkpoint
    from model.args import read_model_args

    args = read_model_args(locate_checkpoint(config.model, "facts"))
    yield from memory_checks(config, args, this_machine(config.group.backend))
