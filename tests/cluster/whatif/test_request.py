from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster.device.profile_store import StoredProfile
from cluster.whatif.request import PlanRequest, read_question
from model.errors import CheckpointError
from serving.config import ConfigError
from tests.cluster.profiles import PROFILE
from tests.cluster.whatif.plan_questions import EXAMPLES, SMALL_MODEL

CLUSTER = EXAMPLES / "clusters/8xH100.yaml"


def test_a_folder_and_its_config_json_are_the_same_model(tmp_path: Path) -> None:
    folder = tmp_path / "Mixtral"
    folder.mkdir()
    (folder / "config.json").write_text(SMALL_MODEL.read_text())
    by_folder, by_file = (read_question(PlanRequest(path, CLUSTER)) for path in (folder, folder / "config.json"))
    assert by_folder.args == by_file.args and by_folder.model_name == by_file.model_name == "Mixtral"
    assert (by_folder.workload.num_rows, by_folder.workload.context_tokens, by_folder.dtype) == (64, 4096, "bfloat16")


def test_a_moesaic_config_gives_model_and_options_and_arguments_count_before_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(SMALL_MODEL.read_text())
    config = tmp_path / "moesaic.yaml"
    config.write_text(f"model: {{path: {tmp_path}, name: mine, dtype: float16}}\npools: [{{kv_cache: 5GB}}]\n"
                      "scheduler: {max_batch_tokens: 1024}\n"
                      "placement: {num_rows: 8, context_tokens: 99, min_copies: 2}\n")
    asked = read_question(PlanRequest(config, CLUSTER))
    assert (asked.model_name, asked.dtype, asked.options.min_copies) == ("mine", "float16", 2)
    assert (asked.workload.num_rows, asked.workload.context_tokens) == (8, 99)
    assert asked.demand(asked.cluster).kv_cache_bytes == 5 * 10**9
    other = read_question(PlanRequest(config, CLUSTER, batch=3, dtype="float32", min_copies=1, max_batch_tokens=512))
    assert (other.workload.num_rows, other.dtype, other.options.min_copies) == (3, "float32", 1)
    assert other.config.scheduler.max_batch_tokens == 512 and other.workload.context_tokens == 99


def test_a_kv_cache_that_holds_no_sequence_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((EXAMPLES / "models/Qwen3.5-35B-A3B.json").read_text())
    config = tmp_path / "moesaic.yaml"
    config.write_text(f"model: {{path: {tmp_path}}}\npools: [{{kv_cache: 190MB}}]\n")
    with pytest.raises(ConfigError, match="kv_cache=190000000 bytes, but a KV block and the state slots"):
        read_question(PlanRequest(config, CLUSTER))


@pytest.mark.parametrize(("content", "named"), [
    ("[[1, 2]]", "an array of 1"), ("{}", "is dict"), ("nonsense", "cannot be read as JSON"),
    ("[" * 100_000, "cannot be read as JSON"),
    (json.dumps([[1] * 8] * 31 + [[1] * 7]), "layer 31 is 7 numbers"),
    (json.dumps([[1] * 7 + ["x"]] * 32), "layer 0, expert 7 is 'x'"), (json.dumps([7] * 32), "layer 0 is int")])
def test_an_expert_load_of_the_wrong_shape_is_refused(content: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_question(PlanRequest(SMALL_MODEL, CLUSTER, expert_load=path))
    assert named in str(error.value)


def test_an_expert_load_is_read(tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    path.write_text(json.dumps([[1, 2, 3, 4, 5, 6, 7, 8.5]] * 32))
    asked = read_question(PlanRequest(SMALL_MODEL, CLUSTER, expert_load=path))
    assert asked.workload.expert_load[31] == (1, 2, 3, 4, 5, 6, 7, 8.5)


@pytest.mark.parametrize(("changes", "named"), [
    ({"dtype": "int8"}, "model.dtype"), ({"min_copies": 3}, "placement.min_copies"),
    ({"max_batch_tokens": 0}, "scheduler.max_batch_tokens"), ({"context_tokens": 40_000}, "context 40000 is longer")])
def test_wrong_arguments_are_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_question(PlanRequest(SMALL_MODEL, CLUSTER, **changes))    # type: ignore[arg-type]


def test_a_model_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for path in (tmp_path / "broken.json", tmp_path / "absent", tmp_path):
        with pytest.raises(CheckpointError, match=str(path)):
            read_question(PlanRequest(path, CLUSTER))


def test_a_measured_profile_counts_instead_of_the_data_sheet(tmp_path: Path) -> None:
    args = read_question(PlanRequest(SMALL_MODEL, CLUSTER)).args
    facts = {name: getattr(args, name) for name in ("hidden_size", "moe_intermediate_size", "num_heads", "num_kv_heads",
                                                    "head_dim", "vocab_size", "num_experts")} | {"dtype": "bfloat16"}
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("nodes: [{name: a, device: h200-sxm, profile: measured.json}]")
    (tmp_path / "measured.json").write_text(json.dumps(asdict(StoredProfile(facts, 0.0, PROFILE))))
    asked = read_question(PlanRequest(SMALL_MODEL, cluster))
    assert asked.figures == "measured" and asked.members(asked.cluster)[0].profile == PROFILE
    with pytest.raises(ConfigError, match=r"of another model: dtype='bfloat16' \(here 'float16'\)"):
        read_question(PlanRequest(SMALL_MODEL, cluster, dtype="float16"))
    (tmp_path / "measured.json").write_text("{}")
    with pytest.raises(ConfigError, match="no device profile"):
        read_question(PlanRequest(SMALL_MODEL, cluster))
    (tmp_path / "measured.json").unlink()
    with pytest.raises(ConfigError, match="cannot read profile"):
        read_question(PlanRequest(SMALL_MODEL, cluster))
