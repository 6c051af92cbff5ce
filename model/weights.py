"""Safetensors -> this member's tensors, one at a time, each into its final layout and dtype; names what is wrong."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.args import ModelArgs
from model.checkpoint import DTYPES, Checkpoint, abbreviated
from model.decoder import Decoder
from model.errors import TensorError
from model.kernels.protocol import Kernels
from model.placement import Placement
from model.tensor_uses import TensorUse, tensor_uses

logger = logging.getLogger(__name__)

_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)     # derived values that old checkpoints carry


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did. weights_bytes: held by the Decoder, in the kernels' layouts."""

    bytes_read: int
    weights_bytes: int
    num_tensors: int
    load_s: float


def load_decoder(checkpoint_dir: Path, args: ModelArgs, dtype: torch.dtype, kernels: Kernels, placement: Placement,
                 rank: int, progress: Callable[[int, int], None] | None = None) -> tuple[Decoder, LoadReport]:
    """Read the shared weights and the experts that `placement` gives to `rank`. Raises CheckpointError, TensorError.

    progress(bytes done, bytes total) is called after every tensor.
    """
    began_s = time.perf_counter()
    experts_of_layer = tuple(placement.experts_of(layer, rank) for layer in range(args.num_moe_layers))
    with Checkpoint(checkpoint_dir) as checkpoint:
        decoder = Decoder(args, kernels, dtype, tuple(map(len, experts_of_layer)))
        uses = list(tensor_uses(decoder, set(checkpoint.tensors), experts_of_layer))
        _check_names_and_shapes(checkpoint, uses)
        uses = sorted((use for use in uses if use.fill is not None), key=lambda use: _place(checkpoint, use))
        total_bytes = sum(_num_bytes(checkpoint, use) for use in uses)
        for use in uses:
            _load(checkpoint, use, dtype)
            if progress is not None:
                progress(checkpoint.bytes_read, total_bytes)
        report = LoadReport(checkpoint.bytes_read, decoder.weights_bytes, len(uses), time.perf_counter() - began_s)
    logger.info("weights_loaded rank=%d bytes_read=%d weights_bytes=%d load_s=%.2f", rank, report.bytes_read,
                report.weights_bytes, report.load_s)
    return decoder, report


def _place(checkpoint: Checkpoint, use: TensorUse) -> tuple[str, int, int]:
    stored = checkpoint.tensors[use.name]
    return str(stored.file), stored.start, use.entry or 0


def _num_bytes(checkpoint: Checkpoint, use: TensorUse) -> int:
    stored = checkpoint.tensors[use.name]
    return (stored.end - stored.start) // (1 if use.entry is None else stored.shape[0])


def _load(checkpoint: Checkpoint, use: TensorUse, dtype: torch.dtype) -> None:
    stored = checkpoint.read(use.name, use.entry)
    weight = stored.to(dtype)
    if not _is_finite(weight):
        if _is_finite(stored):
            raise TensorError(f"{use.name} has values beyond the range of {dtype}", fix="load bfloat16 or float32")
        raise TensorError(f"{use.name} holds values that are not finite", fix="fetch that file again")
    assert use.fill is not None
    use.fill(weight)


def _is_finite(weight: Tensor) -> bool:
    """aminmax passes NaN on, and reads memory at its full rate where isfinite() is thirty times slower."""
    if not weight.numel():
        return True
    least, most = torch.aminmax(weight)
    return math.isfinite(least.item()) and math.isfinite(most.item())


def _check_names_and_shapes(checkpoint: Checkpoint, uses: list[TensorUse]) -> None:
    shapes = {use.name: use.shape for use in uses}
    missing = sorted(set(shapes) - set(checkpoint.tensors))
    extra = sorted(name for name in set(checkpoint.tensors) - set(shapes) if not name.endswith(_IGNORED_SUFFIXES))
    if missing:
        also = f"; instead it has {len(extra)} others: {abbreviated(extra)}" if extra else ""
        raise TensorError(f"{checkpoint.folder} misses {len(missing)} tensors: {abbreviated(missing)}{also}",
                          fix="fetch the checkpoint again, or correct config.json")
    if extra:
        raise TensorError(f"{checkpoint.folder} has {len(extra)} tensors that config.json does not call for: "
                          f"{abbreviated(extra)}", fix="correct config.json: these weights are another model's")
    wrong = [f"{name} is {list(checkpoint.tensors[name].shape)}, not {list(shape)}"
             for name, shape in shapes.items() if checkpoint.tensors[name].shape != shape]
    if wrong:
        raise TensorError(f"{len(wrong)} tensors have another shape than config.json says: {abbreviated(wrong)}",
                          fix="correct config.json, or fetch the checkpoint again")
    odd = [f"{name} ({stored.dtype})" for name, stored in checkpoint.tensors.items()
           if name in shapes and stored.dtype not in DTYPES]
    if odd:
        raise TensorError(f"dtypes that are not implemented: {abbreviated(odd)}",
                          fix=f"serve a checkpoint in {', '.join(DTYPES)} (this one looks quantized)")
