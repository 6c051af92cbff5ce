"""Every user option, validated. The YAML of `moesaic up`, the arguments of `serve run` and the Kubernetes ConfigMap are
this model; unknown keys are refused, limits are checked here and nowhere else."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from serving.errors import ServingError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


MIN_CONTEXT_TOKENS = 2              # a prompt and its answer
MAX_CONTEXT_TOKENS = 2**31 - 1      # numbers of messages between processes hold it


class ConfigError(ServingError):
    """The config file cannot be used; the message names the key and what to write instead."""


def parse_bytes(text: object) -> int:
    """Read '1.5GiB', '900 MB' or a plain number as bytes."""
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise ValueError(f"expected a size such as '2GiB' or a number of bytes, got {text!r}")
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size: write for example 900MB, 2GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_host(text: object) -> object:
    """Check an address as sockets take it: brackets and ports belong to URLs."""
    if isinstance(text, str) and (not text or set(text) & set("[]/ ")):
        raise ValueError(f"{text!r} is not a host: write for example 0.0.0.0, ::1 or a name, without brackets")
    return text


Host = Annotated[str, BeforeValidator(parse_host)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


ApiKey = Annotated[str, Field(pattern=r"^[!-~]+$")]     # what can stand behind "Authorization: Bearer "


Origin = Annotated[str, Field(pattern=r"^(\*|null|[a-z][a-z0-9+.-]*://[^/\s]+)$")]      # as browsers write it: no path


class Options(BaseModel):
    """Frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


OptionsT = TypeVar("OptionsT", bound=Options)


class ModelConfig(Options):
    path: str                                   # folder, or hf://owner/name, or modelscope://owner/name
    name: Annotated[str, Field(min_length=1)] | None = None     # as clients call it; default: the last part of path
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    # Default: the checkpoint's.
    max_model_len: Annotated[int, Field(ge=MIN_CONTEXT_TOKENS, le=MAX_CONTEXT_TOKENS)] | None = None
    revision: str | None = None

    @property
    def served_name(self) -> str:
        return self.name or self.path.rstrip("/").rsplit("/", 1)[-1]

    def context_length(self, limit: int) -> int:
        """Return the tokens that one sequence may have, of a checkpoint that allows `limit`. Raises ConfigError."""
        limit = min(limit, MAX_CONTEXT_TOKENS)
        if limit < MIN_CONTEXT_TOKENS:
            raise ConfigError(f"the checkpoint's context is {limit} token, which leaves no room for an answer",
                              fix="correct max_position_embeddings and the rope parameters in its config.json")
        if self.max_model_len is not None and self.max_model_len > limit:
            raise ConfigError(f"model.max_model_len={self.max_model_len} is above the checkpoint's {limit} positions",
                              fix=f"set it to {limit} or less, or remove it")
        return self.max_model_len or limit


class PoolConfig(Options):
    """Nodes of one kind: one Ray Serve deployment, `replicas` shards, each on a node of its own."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")] = "default"
    device: Literal["cpu", "cuda"] = "cpu"
    replicas: PositiveInt = 1
    memory_budget: Bytes | None = None          # per node, for weights + KV cache + buffers + the process itself
    kv_cache: Bytes | None = None               # per shard; default: a share of what the weights leave
    num_threads: PositiveInt | None = None      # CPU threads of one shard; default: num_cpus, at least 1
    num_cpus: Annotated[float, Field(ge=0)] = 1
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)   # Ray custom resources that select the nodes
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    emulated_speed: Annotated[float, Field(gt=0, le=1)] | None = None   # compute for real, then wait as if slower


class SchedulerConfig(Options):
    max_batch_tokens: PositiveInt = 2048        # prefill + decode tokens that one step of one shard may compute
    max_running_requests: PositiveInt = 256
    block_size: Literal[16, 32, 64] = 16        # tokens per KV block
    prefix_caching: bool = True
    snapshot_interval_tokens: PositiveInt = 8192    # of a prompt, between snapshots of states, where layers keep any

    @model_validator(mode="after")
    def _decode_fits_in_one_step(self) -> Self:
        if self.max_batch_tokens < self.max_running_requests:
            raise ValueError(f"max_batch_tokens={self.max_batch_tokens} is below max_running_requests="
                             f"{self.max_running_requests}: raise it, or allow fewer requests")
        return self


class AdmissionConfig(Options):
    """Bounds of one router replica. Over them a request is refused at once with a time to come back."""

    max_open_requests: PositiveInt = 256        # choices admitted and not ended
    max_queued_requests: PositiveInt = 1024     # waiting for admission
    max_queued_tokens: PositiveInt = 2_000_000  # prompt + max_tokens of all admitted and waiting requests
    default_deadline_s: PositiveFloat = 600.0


class RouterConfig(Options):
    replicas: PositiveInt = 1
    num_cpus: Annotated[float, Field(ge=0)] = 0.5
    grpc_port: Annotated[int, Field(ge=0, le=65535)] = 9000    # each router's own gRPC door; 0: any free port
    api_keys: tuple[ApiKey, ...] = ()           # empty: no authentication
    cors_origins: tuple[Origin, ...] = ()       # pages that browsers let ask: https://host:port, or "*" for all
    admission: AdmissionConfig = AdmissionConfig()
    # Step messages that a shard may have unacknowledged before it holds back.
    stream_window: Annotated[int, Field(ge=1, le=65536)] = 64


class GroupConfig(Options):
    """The process group of an epoch."""

    members: PositiveInt | None = None          # start when so many shards are there; default: all pools' replicas
    collective_timeout_s: PositiveFloat = 60.0
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    dispatch: Literal["auto", "all_to_all", "gather"] = "auto"
    gather_max_rows: PositiveInt | None = None  # auto: gather up to so many agreed rows; default: the cost rule's


class PlacementConfig(Options):
    """Rules for who holds which experts and takes which part of the requests."""

    policy: Literal["speed", "even"] = "speed"  # even: alike for all members, as other systems do; for comparisons
    min_copies: Literal[1, 2] = 1               # every expert on so many shards
    num_rows: PositiveInt = 256                 # of a step, all shards together, that the plan is made for
    context_tokens: PositiveInt = 1024          # of a sequence, likewise
    rebalance_margin: Annotated[float, Field(gt=0)] | None = 0.1    # change when so much faster; None: never by itself
    rebalance_interval_s: PositiveFloat = 60.0
    load_half_life_s: PositiveFloat = 300.0     # how fast counted expert loads fade


class ServeConfig(Options):
    """The whole file."""

    application: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]+$")] = "moesaic"
    route_prefix: Annotated[str, Field(pattern=r"^/")] = "/"
    http_host: Host = "127.0.0.1"
    http_port: Annotated[int, Field(ge=0, le=65535)] = 8000     # each router's own HTTP door; 0: any free port
    proxy_port: Annotated[int, Field(ge=1, le=65535)] = 8100    # Ray Serve's HTTP proxy: slower, one for all routers
    model: ModelConfig
    pools: Annotated[tuple[PoolConfig, ...], Field(min_length=1)]
    scheduler: SchedulerConfig = SchedulerConfig()
    router: RouterConfig = RouterConfig()
    group: GroupConfig = GroupConfig()
    placement: PlacementConfig = PlacementConfig()
    local_nodes: tuple[LocalNodeConfig, ...] = ()   # start these Ray nodes on this machine first (demo, tests)

    @model_validator(mode="after")
    def _pool_names_differ(self) -> Self:
        names = [pool.name for pool in self.pools]
        if len(set(names)) != len(names):
            raise ValueError(f"pool names {names} repeat: give every pool a name of its own")
        return self

    @model_validator(mode="after")
    def _proxy_is_beside_the_doors(self) -> Self:
        """Routers on one machine take the ports that follow."""
        for key, first in (("http_port", self.http_port), ("router.grpc_port", self.router.grpc_port)):
            if first and first <= self.proxy_port < first + self.router.replicas:
                raise ValueError(f"proxy_port={self.proxy_port} is among the ports of the routers, from {key}={first}: "
                                 "set one of them to another port")
        return self

    @property
    def num_shards_a_machine(self) -> int:
        """Return how many CPU shards share one machine's memory: local nodes are all on the same."""
        return sum(pool.replicas for pool in self.pools if pool.device == "cpu") if self.local_nodes else 1

    @property
    def num_shards(self) -> int:
        """Return how many shards all pools have together."""
        return sum(pool.replicas for pool in self.pools)

    @property
    def num_members(self) -> int:
        """Return how many shards the group starts with, and goes on with."""
        return self.group.members or self.num_shards


class LocalNodeConfig(Options):
    """One Ray node to start on this machine."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
    num_cpus: PositiveInt = 1
    num_gpus: Annotated[int, Field(ge=0)] = 0
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)


ServeConfig.model_rebuild()


def load_config(path: str | os.PathLike[str]) -> ServeConfig:
    """Read and check a YAML config. Raises ConfigError, which lists every wrong key with its fix."""
    return parse_config(read_keys(path, "config", "examples/demo.yaml"), source=str(path))


def parse_config(content: dict[str, object], source: str = "config") -> ServeConfig:
    """Check the content of a config. Raises ConfigError."""
    return check_options(ServeConfig, content, source, "config")


def read_keys(path: str | os.PathLike[str], what: str, example: str) -> dict[str, object]:
    """Return the keys and values of a YAML file. Raises ConfigError."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"cannot read {what} {path}: {reason}", fix="give the path of a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:     # a month 13, say; too deep
        raise ConfigError(f"{path} is not valid YAML: {error}", fix="mend the line named above") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, not keys and values", fix=f"start from {example}")
    return content


def check_options(kind: type[OptionsT], content: Mapping[str, object], source: str, root: str) -> OptionsT:
    """Check values; `root` names the whole where an error is about no key. Raises ConfigError."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = [f"  {'.'.join(str(part) for part in item['loc']) or root}: {_explain(dict(item))}"
                 for item in error.errors() if not _is_echo(item["loc"], error)]
        raise ConfigError(f"{source} has {len(lines)} wrong value(s):\n" + "\n".join(lines)) from None


def _is_echo(place: tuple[str | int, ...], error: ValidationError) -> bool:
    """Return whether something further inside is wrong: pydantic then calls a list too short, without what is wrong."""
    return any(len(item["loc"]) > len(place) and item["loc"][:len(place)] == place for item in error.errors())


def _explain(item: dict[str, Any]) -> str:
    if item["type"] == "extra_forbidden":
        return "unknown key; remove it or check its spelling"
    message = str(item["msg"]).removeprefix("Value error, ")
    return message if item["type"] in ("missing", "value_error") else f"{message}, got {item['input']!r}"
