"""Both spellings of rotary scaling mean the same."""

from __future__ import annotations

import pytest

from model.rope_args import RopeArgs, read_rope_args

YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


def test_default() -> None:
    assert read_rope_args({}, 10_000.0, 128) == RopeArgs("default", 10_000.0)
    assert read_rope_args({"rope_theta": 7.0}, 10_000.0, 128) == RopeArgs("default", 7.0)
    assert read_rope_args({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 7.0}, 1.0, 128).theta == 5.0


def test_linear_in_both_spellings() -> None:
    new = read_rope_args({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}}, 1.0, 128)
    old = read_rope_args({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5.0}, 1.0, 128)
    assert new == old == RopeArgs("linear", 5.0, factor=2.0)


def test_yarn_in_both_spellings() -> None:
    new = read_rope_args({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5.0, **YARN}}, 1.0, 128)
    old = read_rope_args({"rope_scaling": {"type": "yarn", **YARN}, "rope_theta": 5.0}, 1.0, 128)
    assert new == old
    assert new.original_max_positions == 32 and new.attention_factor == pytest.approx(1.1386, abs=1e-4)


def test_yarn_factor_of_null_follows_from_the_lengths() -> None:
    args = read_rope_args({"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 32}},
                          1e4, 128)
    assert args.factor == 4.0


@pytest.mark.parametrize(("scaling", "limit"), [
    ({}, 512), ({"type": "linear", "factor": 2.0}, 1024), ({"type": "yarn", "factor": 4.0}, 2048),
    ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
    ({"type": "yarn", "factor": None, "original_max_position_embeddings": 128}, 512),
    ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}, 2048)])
def test_the_context_is_what_the_scaling_makes_of_the_trained_one(scaling: dict[str, object], limit: int) -> None:
    """As vLLM has it; max_position_embeddings may be the length before or after the scaling."""
    assert read_rope_args({"rope_scaling": scaling}, 1e4, 512).context_limit(512) == limit
