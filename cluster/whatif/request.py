"""The request to `moesaic plan`, read into a question: files of a model, of a cluster and of expert loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from cluster.device.model_store import locate_checkpoint
from cluster.device.profile_store import StoredProfile
from cluster.planner.costs.profile_check import profile_fault
from cluster.planner.costs.step_costs import Workload
from cluster.planner.memory_demand import min_kv_cache_bytes
from cluster.planner.placement_plan import PlanOptions
from cluster.whatif.question import PlanQuestion
from model.args import ModelArgs, parse_model_args, read_model_args
from model.errors import CheckpointError
from serving.cluster_config import ClusterConfig, load_cluster
from serving.config import ConfigError, ServeConfig, load_config, parse_config
from serving.link.epoch import DeviceProfile

DEFAULT_BATCH, DEFAULT_CONTEXT_TOKENS = 64, 4096
_PROFILE_SHAPE = ("hidden_size", "moe_intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
                  "num_experts")       # facts that a profile must share with the model
EXACT_TIME_LIMIT_S = 4.0        # all layers together: more improves a plan by less than its figures are sure


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The arguments of the command. None: as the Moesaic config says, else the default."""

    model: Path                     # folder with config.json, a config.json, or a Moesaic config (YAML)
    cluster: Path
    batch: int | None = None        # rows of a step, all members together
    context_tokens: int | None = None
    dtype: str | None = None
    min_copies: int | None = None
    max_batch_tokens: int | None = None     # prefill + decode tokens that one step of one member may compute
    expert_load: Path | None = None
    even: bool = False
    fast: bool = False


def read_question(request: PlanRequest) -> PlanQuestion:
    """Read and check everything. Raises ConfigError, CheckpointError."""
    model_name, args, config, is_ours = _read_model(request.model)
    config = _with_arguments(config, request)
    placement = config.placement
    batch = request.batch or (placement.num_rows if is_ours else DEFAULT_BATCH)
    context_tokens = request.context_tokens or (placement.context_tokens if is_ours else DEFAULT_CONTEXT_TOKENS)
    if context_tokens > args.context_limit:
        raise ConfigError(f"context {context_tokens} is longer than the model's {args.context_limit} positions",
                          fix=f"give --context up to {args.context_limit}")
    min_kv_cache_bytes(args, config)        # refuses one that is too small before anything is worked out
    load = _read_expert_load(request.expert_load, args) if request.expert_load else ()
    cluster = load_cluster(request.cluster)
    return PlanQuestion(
        model_name=model_name, args=args, dtype=config.model.dtype, config=config, cluster=cluster,
        workload=Workload(batch, context_tokens, load),
        options=PlanOptions(policy="even" if request.even else placement.policy, min_copies=placement.min_copies,
                            exact=not request.fast, time_limit_s=EXACT_TIME_LIMIT_S),
        measured=_read_profiles(cluster, request.cluster.parent, args, config.model.dtype))


def _read_model(path: Path) -> tuple[str, ModelArgs, ServeConfig, bool]:
    """Return (name, facts, config, whether the config is the user's)."""
    path = path.expanduser()
    if path.suffix in (".yaml", ".yml"):
        config = load_config(path)
        return config.model.served_name, read_model_args(locate_checkpoint(config.model, "facts")), config, True
    if path.is_file():
        name = path.stem if path.stem != "config" else path.resolve().parent.name
        args = parse_model_args(_read_json_object(path))
    else:
        name, args = path.resolve().name, read_model_args(path)
    return name, args, parse_config({"model": {"path": str(path)}, "pools": [{}]}), False


def _read_json_object(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}",
                              fix="give a config.json, a folder with one, or a Moesaic config (.yaml)") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object", fix="give the config.json of a checkpoint")
    return content


def _with_arguments(config: ServeConfig, request: PlanRequest) -> ServeConfig:
    """Put the arguments before the config, and check them as if they stood in it."""
    content = config.model_dump()
    for section, key, value in (("model", "dtype", request.dtype), ("placement", "min_copies", request.min_copies),
                                ("scheduler", "max_batch_tokens", request.max_batch_tokens)):
        if value is not None:
            content[section][key] = value
    return parse_config(content, source="the command line")


def _read_profiles(cluster: ClusterConfig, folder: Path, args: ModelArgs, dtype: str) -> dict[str, DeviceProfile]:
    """Read the profiles by kind of node. Paths are relative to the cluster file's folder."""
    return {nodes.name: _read_profile(nodes.name, folder / Path(nodes.profile).expanduser(), args, dtype)
            for nodes in cluster.nodes if nodes.profile is not None}


def _read_profile(kind: str, path: Path, args: ModelArgs, dtype: str) -> DeviceProfile:
    try:
        stored = TypeAdapter(StoredProfile).validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{kind}: cannot read profile {path}: {error.strerror}",
                          fix="give a file that a shard wrote under ~/.cache/moesaic/profiles") from error
    except ValueError as error:
        raise ConfigError(f"{kind}: {path} is no device profile: {str(error).splitlines()[0]}",
                          fix="give a file that a shard wrote under ~/.cache/moesaic/profiles") from error
    fault = profile_fault(stored.profile)
    if fault:
        raise ConfigError(f"{kind}: {path} is no device profile: {fault}", fix="measure it again")
    wanted = {name: getattr(args, name) for name in _PROFILE_SHAPE} | {"dtype": dtype}
    differs = [f"{name}={stored.facts.get(name)!r} (here {value!r})" for name, value in wanted.items()
               if stored.facts.get(name) != value]
    if differs:
        raise ConfigError(f"{kind}: profile {path} is of another model: {', '.join(differs)}",
                          fix="measure with this model, or take the profile away")
    return stored.profile


def _read_expert_load(path: Path, args: ModelArgs) -> tuple[tuple[float, ...], ...]:
    """Read a JSON array [MoE layers][experts] of numbers, relative within a layer."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"expert load {path} cannot be read as JSON: {error}",
                          fix="give an array of one array a MoE layer, with one number an expert") from error
    wanted = f"{args.num_moe_layers} arrays (MoE layers) of {args.num_experts} numbers (experts)"
    if not isinstance(content, list) or len(content) != args.num_moe_layers:
        found = f"an array of {len(content)}" if isinstance(content, list) else type(content).__name__
        raise ConfigError(f"expert load {path} is {found}", fix=f"it must be {wanted}")
    return tuple(_layer_load(path, layer, of_layer, args.num_experts) for layer, of_layer in enumerate(content))


def _layer_load(path: Path, layer: int, content: object, num_experts: int) -> tuple[float, ...]:
    if not isinstance(content, list) or len(content) != num_experts:
        found = f"{len(content)} numbers" if isinstance(content, list) else type(content).__name__
        raise ConfigError(f"expert load {path}: layer {layer} is {found}", fix=f"it must be {num_experts} numbers, "
                          "one an expert")
    for expert, value in enumerate(content):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"expert load {path}: layer {layer}, expert {expert} is {value!r}",
                              fix="it must be a number, zero or more")
    return tuple(float(value) for value in content)
