"""Every user option, validated. The YAML of `moesaic up`, the arguments of `serve run` and the Kubernetes ConfigMap are
this model; unknown keys are refused, limits are checked here and nowhere else."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from serving.errors import ServingError
from serving.log_format import LogFormat
from serving.option_types import AbsolutePath, Bytes, CollectorUrl, DatabaseUrl, Host, Origin, ToolParserName

MIN_CONTEXT_TOKENS = 2              # a prompt and its answer
MAX_CONTEXT_TOKENS = 2**31 - 1      # numbers of messages between processes hold it


class ConfigError(ServingError):
    """The config file cannot be used; the message names the key and what to write instead."""


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
    min_replicas: PositiveInt | None = None     # the group may start with so many: group.settle_s; default: replicas
    # `moesaic scale` and the autoscaler may ask for so many; default: replicas.
    max_replicas: PositiveInt | None = None
    cost_per_hour: PositiveFloat = 1.0          # of one shard, in any currency, for the autoscaler
    memory_budget: Bytes | None = None          # per node, for weights + KV cache + buffers + the process itself
    kv_cache: Bytes | None = None               # per shard; default: a share of what the weights leave
    num_threads: PositiveInt | None = None      # CPU threads of one shard; default: num_cpus, at least 1
    num_cpus: Annotated[float, Field(ge=0)] = 1
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)   # Ray custom resources that select the nodes
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    emulated_speed: Annotated[float, Field(gt=0, le=1)] | None = None   # compute for real, then wait as if slower

    @model_validator(mode="after")
    def _replicas_are_in_order(self) -> Self:
        if self.least_replicas > self.replicas:
            raise ValueError(f"pool {self.name}: min_replicas={self.min_replicas} is above replicas={self.replicas}: "
                             "correct one of them")
        if self.most_replicas < self.replicas:
            raise ValueError(f"pool {self.name}: max_replicas={self.max_replicas} is below replicas={self.replicas}: "
                             "correct one of them")
        return self

    @property
    def least_replicas(self) -> int:
        return self.min_replicas or self.replicas

    @property
    def most_replicas(self) -> int:
        return self.max_replicas or self.replicas


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
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)   # Ray custom resources that select the nodes
    grpc_port: Annotated[int, Field(ge=0, le=65535)] = 9000    # each router's own gRPC door; 0: any free port
    tool_parser: ToolParserName | None = None   # how tool calls are written; default: as the chat template shows
    cors_origins: tuple[Origin, ...] = ()       # pages that browsers let ask: https://host:port, or "*" for all
    admission: AdmissionConfig = AdmissionConfig()
    log_requests: bool = False                  # one line for each request that has ended, without its content
    # Step messages that a shard may have unacknowledged before it holds back.
    stream_window: Annotated[int, Field(ge=1, le=65536)] = 64


class PriceConfig(Options):
    """What a million tokens cost. A token of the prompt that was served from the cache costs `cached` only."""

    prompt: Annotated[float, Field(ge=0)]
    cached: Annotated[float, Field(ge=0)]
    generated: Annotated[float, Field(ge=0)]
    reasoning: Annotated[float, Field(ge=0)] | None = None      # of the generated; default: as they
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"


class AccessConfig(Options):
    """Who may ask."""

    keys: bool = False                          # only who has a key: moesaic keys create
    database: DatabaseUrl | None = None         # of keys and usage; default: SQLite in the state folder
    keep_requests_days: PositiveInt = 90        # one by one; what older ones have used is kept by day and key
    open_to_network: bool = False               # without keys, http_host may be reached from other machines
    prices: PriceConfig | None = None           # for the bill of moesaic usage


class TlsConfig(Options):
    """PEM files of the doors, the key without a password, on every node with a router. Renewed files are taken up by
    the next connection."""

    certificate: AbsolutePath               # the own one first, then those between it and the root
    key: AbsolutePath


class ClusterTlsConfig(TlsConfig):
    """Likewise of the links between routers and shards, on every node: each side shows a certificate of `ca`, and
    shards one for the DNS name moesaic.internal. Use a CA that signs nothing else."""

    ca: AbsolutePath


class TracingConfig(Options):
    """Where spans of requests are sent to, by OTLP. Headers that the collector asks for are in the variable
    OTEL_EXPORTER_OTLP_HEADERS of routers and shards, never in here."""

    endpoint: CollectorUrl                      # of a collector: http://host:4317, or https
    protocol: Literal["grpc", "http"] = "grpc"  # http: protobuf to /v1/traces below the endpoint
    # Of requests whose client sends no traceparent: who sends one says in it whether to trace.
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0


class BatchConfig(Options):
    """Bounds of files and batches. They are kept in the database of keys: access.database."""

    max_file_bytes: Bytes = 128 * 2**20         # of one uploaded file
    max_tenant_bytes: Bytes = 2**30             # of all files of one tenant
    max_lines: Annotated[int, Field(ge=1, le=1_000_000)] = 50_000       # of one batch
    max_concurrent: PositiveInt = 8             # lines that one router computes at a time
    keep_days: Annotated[int, Field(ge=2, le=3650)] = 30    # files and batches, from their creation


class GroupConfig(Options):
    """The process group of an epoch."""

    members: PositiveInt | None = None          # start with so many shards, never have more; default: what pools have
    # Start with fewer, of every pool its min_replicas, when no other has come for so long and they can hold the model.
    settle_s: Annotated[float, Field(ge=0)] = 30.0
    collective_timeout_s: PositiveFloat = 60.0
    # A member that answers no heartbeat for so long is given up: it hangs, or its node cannot be reached.
    silence_timeout_s: Annotated[float, Field(ge=0.5)] = 0.8
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


class AutoscalingConfig(Options):
    """Goals by which the pools' replicas follow the load, from min_replicas to max_replicas."""

    ttft_slo_s: PositiveFloat = 5.0             # from a request to its first token
    itl_slo_s: PositiveFloat = 0.2              # from one token of an answer to the next; bounds prompts in a step
    keep_alive_s: PositiveFloat = 60.0          # a replica that has not been needed for so long goes
    # Without any request for so long all shards go, and the first request has them start again; None: never.
    idle_timeout_s: PositiveFloat | None = None


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
    access: AccessConfig = AccessConfig()
    tls: TlsConfig | None = None                # of the HTTP and gRPC doors; None: plain
    cluster_tls: ClusterTlsConfig | None = None     # of the links between routers and shards; None: plain
    tracing: TracingConfig | None = None        # None: no spans
    batch: BatchConfig = BatchConfig()
    group: GroupConfig = GroupConfig()
    placement: PlacementConfig = PlacementConfig()
    autoscaling: AutoscalingConfig | None = None    # None: pools have `replicas`, or as many as `moesaic scale` says
    log_format: LogFormat = "text"                  # json: one object a line, on stdout instead of stderr
    local_nodes: tuple[LocalNodeConfig, ...] = ()   # start these Ray nodes on this machine first (demo, tests)

    @model_validator(mode="after")
    def _pool_names_differ(self) -> Self:
        names = [pool.name for pool in self.pools]
        if len(set(names)) != len(names):
            raise ValueError(f"pool names {names} repeat: give every pool a name of its own")
        return self

    @model_validator(mode="after")
    def _group_can_follow_the_load(self) -> Self:
        if self.autoscaling is not None and self.group.members is not None:
            raise ValueError(f"autoscaling with group.members={self.group.members}: the group could never have more: "
                             "remove one of them")
        return self

    @model_validator(mode="after")
    def _proxy_is_beside_the_doors(self) -> Self:
        """Routers on one machine take the ports that follow."""
        for key, first in (("http_port", self.http_port), ("router.grpc_port", self.router.grpc_port)):
            if first and first <= self.proxy_port < first + self.router.replicas:
                raise ValueError(f"proxy_port={self.proxy_port} is among the ports of the routers, from {key}={first}: "
                                 "set one of them to another port")
        return self

    @model_validator(mode="after")
    def _strangers_need_keys(self) -> Self:
        if not self.access.keys and not self.access.open_to_network and not _is_loopback(self.http_host):
            raise ValueError(f"http_host={self.http_host} can be reached from other machines, and anybody may ask: set "
                             "access.keys to true, or say that this is meant: access.open_to_network: true")
        return self

    @property
    def certificates(self) -> dict[str, TlsConfig]:
        """Return which files are read, by their keys in the config."""
        return {key: files for key, files in (("tls", self.tls), ("cluster_tls", self.cluster_tls)) if files}

    @property
    def proxy_host(self) -> str:
        """Return where Ray Serve's proxy listens, which is plain: beside doors with TLS for its own machine only."""
        return "127.0.0.1" if self.tls else self.http_host

    @property
    def num_shards_a_machine(self) -> int:
        """Return how many CPU shards share one machine's memory: local nodes are all on the same."""
        return sum(pool.most_replicas for pool in self.pools if pool.device == "cpu") if self.local_nodes else 1

    @property
    def num_shards(self) -> int:
        """Return how many shards all pools have together."""
        return sum(pool.replicas for pool in self.pools)

    @property
    def num_members(self) -> int:
        """Return with how many shards the group starts at once."""
        return self.group.members or self.num_shards


class LocalNodeConfig(Options):
    """One Ray node to start on this machine."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
    num_cpus: PositiveInt = 1
    num_gpus: Annotated[int, Field(ge=0)] = 0
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)


ServeConfig.model_rebuild()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
