from __future__ import annotations

import pytest

from cluster.planner.costs.device_curves import expert_rate
from cluster.planner.costs.profile_check import profile_fault
from cluster.whatif.data_sheets import DEVICE_SPECS, compute_dtype, data_sheet_profile, device_figures
from cluster.whatif.request import PlanRequest, read_question
from model.args import ModelArgs
from serving.cluster_config import AssumedFigures, DeviceFigures
from serving.config import ConfigError
from tests.cluster.whatif.plan_questions import EXAMPLES, HUGE_MODEL

ASSUMED = AssumedFigures(read_efficiency=1.0, flop_efficiency=0.5)


@pytest.fixture(scope="module")
def args() -> ModelArgs:
    return read_question(PlanRequest(HUGE_MODEL, EXAMPLES / "clusters/8xH100.yaml")).args


@pytest.mark.parametrize("kind", DEVICE_SPECS)
def test_every_device_names_its_source_and_gives_a_sound_profile(kind: str, args: ModelArgs) -> None:
    figures = device_figures(kind)
    assert figures.source and figures.url.startswith("https://") and figures.link is not None and figures.link.source
    profile = data_sheet_profile(args, "bfloat16", 2, figures, AssumedFigures())
    assert profile_fault(profile) is None
    assert profile.source == "data-sheet"


def test_an_expert_is_read_for_few_rows_and_computed_for_many(args: ModelArgs) -> None:
    profile = data_sheet_profile(args, "bfloat16", 2, DEVICE_SPECS["h100-sxm"], ASSUMED)
    rate = expert_rate(profile)
    num_weights = 3 * 4096 * 1536
    assert rate.read_s == pytest.approx(2 * num_weights / 3.35e12, rel=0.01)
    assert rate.row_s == pytest.approx(2 * num_weights / (989.5e12 / 2), rel=0.01)


def test_a_token_of_context_costs_the_reading_of_its_keys_and_values(args: ModelArgs) -> None:
    profile = data_sheet_profile(args, "bfloat16", 2, DEVICE_SPECS["h100-sxm"], ASSUMED)
    assert profile.attention_s == pytest.approx(2 * 4 * 128 * 2 / 3.35e12)


def test_without_the_dtype_a_device_computes_in_float32(args: ModelArgs) -> None:
    t4 = DEVICE_SPECS["t4"]
    assert compute_dtype(t4, "bfloat16") == "float32" and compute_dtype(t4, "float16") == "float16"
    slow, fast = (data_sheet_profile(args, dtype, 2, t4, ASSUMED) for dtype in ("bfloat16", "float16"))
    assert expert_rate(slow).row_s == pytest.approx(expert_rate(fast).row_s * 65 / 8.1, rel=0.01)
    only = DeviceFigures(vendor="x", memory=1, read_bandwidth=1, flops={"float16": 1}, source="s")
    with pytest.raises(ConfigError, match="neither bfloat16 nor float32"):
        data_sheet_profile(args, "bfloat16", 2, only, ASSUMED)


def test_a_device_that_computes_slower_than_it_reads_has_a_sound_profile_too(args: ModelArgs) -> None:
    figures = DeviceFigures(vendor="cpu", memory=8 * 10**9, read_bandwidth=30e9, flops={"float32": 5e9}, source="s")
    assert profile_fault(data_sheet_profile(args, "float32", 4, figures, ASSUMED)) is None


def test_an_unknown_kind_lists_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match="'h100' is not known.*a100-40g-sxm.*t4"):
        device_figures("h100")
