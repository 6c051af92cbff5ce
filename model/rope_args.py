"""Reads the rotary embedding's facts from config.json, in both spellings. Pure: no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from model.errors import CheckpointError, UnsupportedFieldError
from model.json_file import shown

_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"},
}
_FIX = "correct the rope parameters"
_MOST = 1e12        # of any rope number: products of two are still whole numbers of positions
_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_MROPE = {"mrope_section", "mrope_interleaved"}


@dataclass(frozen=True, slots=True)
class RopeArgs:
    """Holds the facts: `kind` is default, linear or yarn; the yarn fields mean what they mean in transformers 5."""

    kind: str
    theta: float
    factor: float = 1.0
    original_max_positions: int = 0
    attention_factor: float = 1.0       # multiplies cos and sin
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    rotary_factor: float = 1.0          # share of a head's dimensions that is rotated, the first ones

    def context_limit(self, max_positions: int) -> int:
        """Return the tokens that a sequence may have, of a checkpoint whose `max_position_embeddings` is given.

        As in vLLM: what the model was trained for, times the scaling; yarn says what that was.
        """
        trained = self.original_max_positions if self.kind == "yarn" else max_positions
        return int(trained * self.factor)


def read_rope_args(config: Mapping[str, object], default_theta: float, max_positions: int,
                   partial_rotary_factor: float | None = None) -> RopeArgs:
    """Read `rope_parameters` (transformers 5) or `rope_scaling` with `rope_theta` beside it (transformers 4).

    As in transformers, a given `rope_scaling` wins over `rope_parameters`, and what stands inside over what stands
    beside. `partial_rotary_factor` is the family's default; None: it rotates whole heads, and has no mrope sections
    (which dimensions follow an image's height and width; the positions of text are the same in all of them).
    """
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"config.json: rope parameters are {shown(scaling)}, not an object", fix=_FIX)
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind not in _KEYS:
        raise UnsupportedFieldError(f"config.json: rope_type={kind!r} is not implemented",
                                    fix=f"known are {', '.join(_KEYS)}")
    rotary_factor = _rotary_factor(config, scaling, partial_rotary_factor)
    known = _KEYS[kind] | _ALWAYS | (_MROPE if partial_rotary_factor is not None else set())
    unknown = {key for key, value in scaling.items() if value is not None} - known
    if unknown:
        raise UnsupportedFieldError(f"config.json: {sorted(unknown)} mean nothing to rope_type={kind!r}",
                                    fix="correct the rope parameters, or serve another checkpoint")
    theta = _positive(_first_given(scaling.get("rope_theta"), config.get("rope_theta"), default_theta), "rope_theta")
    if kind == "default":
        return RopeArgs(kind, theta, rotary_factor=rotary_factor)
    if kind == "linear":
        return RopeArgs(kind, theta, _positive(scaling.get("factor"), "rope factor"), rotary_factor=rotary_factor)
    yarn = _yarn(scaling, theta, config.get("original_max_position_embeddings"), max_positions)
    return replace(yarn, rotary_factor=rotary_factor)


def _rotary_factor(config: Mapping[str, object], scaling: Mapping[str, object],
                   default: float | None) -> float:
    inside, beside = scaling.get("partial_rotary_factor"), config.get("partial_rotary_factor")
    given = beside if inside is None else inside
    factor = default or 1.0 if given is None else _positive(given, "partial_rotary_factor")
    if default is None and factor != 1.0:
        raise UnsupportedFieldError(f"config.json: partial_rotary_factor={given!r} is not implemented",
                                    fix="serve a checkpoint that rotates whole heads")
    return factor


def _yarn(scaling: Mapping[str, object], theta: float, outer_original: object, max_positions: int) -> RopeArgs:
    original = int(_positive(_first_given(outer_original, scaling.get("original_max_position_embeddings"),
                                          max_positions), "original_max_position_embeddings", least=1.0))
    factor = _positive(_first_given(scaling.get("factor"), max_positions / original), "rope factor")
    truncate = scaling.get("truncate", True)
    if truncate is not None and not isinstance(truncate, bool):
        raise CheckpointError(f"config.json: truncate={truncate!r} is not true or false", fix=_FIX)
    return RopeArgs(
        "yarn", theta, factor=factor, original_max_positions=original,
        attention_factor=_positive(_first_given(scaling.get("attention_factor"), _attention_factor(scaling, factor)),
                                   "attention_factor"),
        beta_fast=_positive(_first_given(scaling.get("beta_fast"), 32.0), "beta_fast"),
        beta_slow=_positive(_first_given(scaling.get("beta_slow"), 1.0), "beta_slow"), truncate=bool(truncate))


def _attention_factor(scaling: Mapping[str, object], factor: float) -> float:
    """Return the factor as transformers does: both mscales count, or neither; 0 is not given."""
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return (_scale_of(factor, _positive(mscale, "mscale"))
                / _scale_of(factor, _positive(mscale_all_dim, "mscale_all_dim")))
    return _scale_of(factor, 1.0)


def _scale_of(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _first_given(*values: object) -> object:
    """Return the first that is not null: 0 is a value, and a wrong one."""
    return next((value for value in values if value is not None), None)


def _positive(value: object, name: str, least: float = 0.0) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (0 < value <= _MOST and value >= least):
        bound = f"of at least {least:g}" if least else "above 0"
        raise CheckpointError(f"config.json: {name}={shown(value)} is not a number {bound}, up to {_MOST:g}",
                              fix=_FIX)
    return float(value)
