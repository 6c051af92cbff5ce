"""Reads safetensors into this member's weights, one at a time, in final layout and dtype; names what is wrong."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.args import ModelArgs
from model.checkpoint import DTYPES, Checkpoint, StoredTensor
from model.checkpoint_files import abbreviated
from model.decoder import Decoder
from model.errors import TensorError
from model.expert_host import ExpertHost
from model.families import FAMILIES
from model.fp8 import dequantize
from model.kernels.protocol import ExpertWeights, Kernels
from model.moe import new_experts
from model.placement import Placement
from model.quantization_args import scale_name, scale_shape
from model.tensor_uses import TensorUse, expert_uses, tensor_uses

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

_FP8 = "F8_E4M3"
_FACTOR_DTYPES = ("F32", "BF16", "F16")
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)     # derived values that old checkpoints carry


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Says what a load did. weights_bytes: held by the Decoder, in the kernels' layouts."""

    bytes_read: int
    weights_bytes: int
    num_tensors: int
    load_s: float


@dataclass(frozen=True, slots=True)
class LayerFill:
    """Names experts of one MoE layer (`layer` counts only these) to be read into `slots` of `weights`, by expert."""

    layer: int
    weights: ExpertWeights
    slots: Mapping[int, int]


class WeightLoader:
    """Reads one member's tensors of one checkpoint, whose headers are read once. For one thread at a time.

    progress(bytes done, bytes total) is called after every tensor; what it raises ends the load.
    """

    def __init__(self, checkpoint_dir: Path, args: ModelArgs, dtype: torch.dtype, kernels: Kernels) -> None:
        """Read the headers. Raises CheckpointError, TensorError."""
        self.args = args
        self.dtype = dtype
        self.kernels = kernels
        self.checkpoint_dir = checkpoint_dir
        self._checkpoint = Checkpoint(checkpoint_dir)
        self._names = set(self._checkpoint.tensors)

    def load_decoder(self, placement: Placement, rank: int,
                     progress: Progress | None = None) -> tuple[Decoder, LoadReport]:
        """Load the shared weights, and the experts that `placement` gives to `rank`. Raises TensorError."""
        began_s = time.perf_counter()
        experts_of_layer = _experts_of_layer(self.args, placement, rank)
        decoder = Decoder(self.args, self.kernels, self.dtype, tuple(map(len, experts_of_layer)))
        uses = list(tensor_uses(decoder, self._names, experts_of_layer))
        _check_names(self._checkpoint, uses, FAMILIES[self.args.family].skipped_prefixes)
        _check_shapes(self._checkpoint, uses)
        _check_factors(self._checkpoint, uses, self.args.weight_block_size)
        num_tensors, bytes_read = self._load(uses, progress)
        return decoder, _report(rank, decoder.weights_bytes, num_tensors, bytes_read, began_s)

    def load_expert_host(self, placement: Placement, rank: int,
                         progress: Progress | None = None) -> tuple[ExpertHost, LoadReport]:
        """Load only the experts that `placement` gives to `rank`; the shared weights are not looked at. Raises
        TensorError.
        """
        began_s = time.perf_counter()
        experts_of_layer = _experts_of_layer(self.args, placement, rank)
        host = ExpertHost(self.args, self.kernels, self.dtype, tuple(map(len, experts_of_layer)))
        fills = [LayerFill(layer, host.experts[layer].weights, {expert: slot for slot, expert in enumerate(experts)})
                 for layer, experts in enumerate(experts_of_layer)]
        uses = list(self._uses(fills))
        _check_shapes(self._checkpoint, uses)
        _check_factors(self._checkpoint, uses, self.args.weight_block_size)
        num_tensors, bytes_read = self._load(uses, progress)
        return host, _report(rank, host.weights_bytes, num_tensors, bytes_read, began_s)

    def load_experts(self, fills: Sequence[LayerFill], progress: Progress | None = None) -> int:
        """Load some experts of some layers -> bytes read. Raises TensorError."""
        return self._load(self._uses(fills), progress)[1]

    def reading_bytes(self, layers: Iterable[int]) -> int:
        """Return the bytes that reading experts of these MoE layers takes for a moment: one tensor as stored, and
        converted."""
        empty = new_experts(self.args, 0, self.kernels, self.dtype)
        uses = self._uses([LayerFill(layer, empty, {}) for layer in layers])
        return max((_bytes_at_once(self._checkpoint.tensors[use.name], self.dtype) for use in uses), default=0)

    def _uses(self, fills: Iterable[LayerFill]) -> Iterator[TensorUse]:
        for fill in fills:
            yield from expert_uses(self.args, self._names, fill.layer, fill.weights, fill.slots)

    def _load(self, uses: Iterable[TensorUse], progress: Progress | None) -> tuple[int, int]:
        """Fill what is this member's -> (tensors, bytes) read, in the order in which they lie in the files."""
        wanted = sorted((use for use in uses if use.fill is not None), key=lambda use: _place(self._checkpoint, use))
        total_bytes = sum(_num_bytes(self._checkpoint, use) for use in wanted)
        read_before = self._checkpoint.bytes_read
        with self._checkpoint:
            for use in wanted:
                _load(self._checkpoint, use, self.dtype, self.args.weight_block_size)
                if progress is not None:
                    progress(self._checkpoint.bytes_read - read_before, total_bytes)
        return len(wanted), self._checkpoint.bytes_read - read_before


def load_decoder(checkpoint_dir: Path, args: ModelArgs, dtype: torch.dtype, kernels: Kernels, placement: Placement,
                 rank: int, progress: Progress | None = None) -> tuple[Decoder, LoadReport]:
    """Load as WeightLoader does, for who loads only once. Raises CheckpointError, TensorError."""
    return WeightLoader(checkpoint_dir, args, dtype, kernels).load_decoder(placement, rank, progress)


def _experts_of_layer(args: ModelArgs, placement: Placement, rank: int) -> tuple[tuple[int, ...], ...]:
    return tuple(placement.experts_of(layer, rank) for layer in range(args.num_moe_layers))


def _report(rank: int, weights_bytes: int, num_tensors: int, bytes_read: int, began_s: float) -> LoadReport:
    report = LoadReport(bytes_read, weights_bytes, num_tensors, time.perf_counter() - began_s)
    logger.info("weights_loaded rank=%d bytes_read=%d weights_bytes=%d load_s=%.2f", rank, report.bytes_read,
                report.weights_bytes, report.load_s)
    return report


def _place(checkpoint: Checkpoint, use: TensorUse) -> tuple[str, int, int]:
    stored = checkpoint.tensors[use.name]
    return str(stored.file), stored.start, use.entry or 0


def _num_bytes(checkpoint: Checkpoint, use: TensorUse) -> int:
    stored = [checkpoint.tensors[use.name]]
    if stored[0].dtype == _FP8:
        stored.append(checkpoint.tensors[scale_name(use.name)])
    return sum(some.end - some.start for some in stored) // (1 if use.entry is None else stored[0].shape[0])


def _bytes_at_once(stored: StoredTensor, dtype: torch.dtype) -> int:
    """Return the bytes that are held while a tensor of one expert, or one expert of a fused tensor, is read."""
    stored_dtype = DTYPES[stored.dtype]
    read_dtype = torch.float32 if stored.dtype == _FP8 else stored_dtype
    element_bytes = stored_dtype.itemsize + (0 if read_dtype is stored_dtype else read_dtype.itemsize)
    return math.prod(stored.shape[-2:]) * (element_bytes + (0 if read_dtype is dtype else dtype.itemsize))


def _read(checkpoint: Checkpoint, use: TensorUse, block_size: tuple[int, int] | None) -> Tensor:
    """Read a tensor as it is stored, or one in fp8 as the fp32 numbers that it stands for."""
    if checkpoint.tensors[use.name].dtype != _FP8:
        return checkpoint.read(use.name, use.entry)
    assert block_size is not None
    factors_nk = checkpoint.read(scale_name(use.name), use.entry).to(torch.float32, copy=True)
    if not _is_finite(factors_nk):
        raise TensorError(f"{scale_name(use.name)} holds values that are not finite", fix="fetch that file again")
    return dequantize(checkpoint.read(use.name, use.entry), factors_nk, block_size)


def _load(checkpoint: Checkpoint, use: TensorUse, dtype: torch.dtype, block_size: tuple[int, int] | None) -> None:
    stored = _read(checkpoint, use, block_size)
    weight = stored.to(torch.float32 if use.in_fp32 else dtype)
    if not _is_finite(weight):
        if _is_finite(stored):
            raise TensorError(f"{use.name} has values beyond the range of {dtype}", fix="load bfloat16 or float32")
        raise TensorError(f"{use.name} holds values that are not finite", fix="fetch that file again")
    assert use.fill is not None
    use.fill(weight)


def _is_finite(weight: Tensor) -> bool:
    """Return whether no value is NaN or infinite. aminmax passes NaN on, and is thirty times faster than isfinite()."""
    if not weight.numel():
        return True
    least, most = torch.aminmax(weight)
    return math.isfinite(least.item()) and math.isfinite(most.item())


def _check_names(checkpoint: Checkpoint, uses: list[TensorUse], skipped_prefixes: tuple[str, ...]) -> None:
    """Compare the checkpoint's names with the uses, which are all that it should hold, but for what its family has
    beside the language model."""
    names = {use.name for use in uses}
    factors = {scale_name(name) for name in names & set(checkpoint.tensors)
               if checkpoint.tensors[name].dtype.startswith("F8")}
    unused = set(checkpoint.tensors) - names - factors
    skipped = {name for name in unused if name.startswith(skipped_prefixes)}
    if skipped:
        logger.info("weights_skipped num_tensors=%d bytes=%d prefixes=%s", len(skipped), sum(
            checkpoint.tensors[name].end - checkpoint.tensors[name].start for name in skipped),
            ",".join(sorted({next(p for p in skipped_prefixes if name.startswith(p)) for name in skipped})))
    extra = sorted(name for name in unused - skipped if not name.endswith(_IGNORED_SUFFIXES))
    also = f"; instead it has {len(extra)} others: {abbreviated(extra)}" if extra else ""
    _refuse_missing(checkpoint, names, also)
    if extra:
        raise TensorError(f"{checkpoint.folder} has {len(extra)} tensors that config.json does not call for: "
                          f"{abbreviated(extra)}", fix="correct config.json: these weights are another model's")


def _refuse_missing(checkpoint: Checkpoint, names: set[str], also: str = "") -> None:
    missing = sorted(names - set(checkpoint.tensors))
    if missing:
        raise TensorError(f"{checkpoint.folder} misses {len(missing)} tensors: {abbreviated(missing)}{also}",
                          fix="fetch the checkpoint again, or correct config.json")


def _check_shapes(checkpoint: Checkpoint, uses: list[TensorUse]) -> None:
    shapes = {use.name: use.shape for use in uses}
    _refuse_missing(checkpoint, set(shapes))
    wrong = [f"{name} is {list(checkpoint.tensors[name].shape)}, not {list(shape)}"
             for name, shape in shapes.items() if checkpoint.tensors[name].shape != shape]
    if wrong:
        raise TensorError(f"{len(wrong)} tensors have another shape than config.json says: {abbreviated(wrong)}",
                          fix="correct config.json, or fetch the checkpoint again")
    odd = [f"{name} ({stored.dtype})" for name, stored in checkpoint.tensors.items()
           if name in shapes and stored.dtype not in DTYPES]
    if odd:
        raise TensorError(f"dtypes that are not implemented: {abbreviated(odd)}",
                          fix=f"serve a checkpoint in {', '.join(DTYPES)}")


def _check_factors(checkpoint: Checkpoint, uses: list[TensorUse], block_size: tuple[int, int] | None) -> None:
    """Raise TensorError unless each weight in fp8 has the factors of its blocks beside it."""
    shapes = {use.name: use.shape for use in uses if checkpoint.tensors[use.name].dtype == _FP8}
    if not shapes:
        return
    if block_size is None or any(len(shape) < 2 for shape in shapes.values()):
        odd = sorted(name for name, shape in shapes.items() if block_size is None or len(shape) < 2)
        raise TensorError(f"{len(odd)} tensors are stored in fp8 and config.json does not say in which blocks: "
                          f"{abbreviated(odd)}", fix="correct its quantization_config, or fetch it again")
    _refuse_missing(checkpoint, set(map(scale_name, shapes)))
    wrong = []
    for name, shape in shapes.items():
        factors, wanted = checkpoint.tensors[scale_name(name)], scale_shape(shape, block_size)
        if factors.shape != wanted or factors.dtype not in _FACTOR_DTYPES:
            wrong.append(f"{scale_name(name)} is {list(factors.shape)} in {factors.dtype}, not {list(wanted)}")
    if wrong:
        raise TensorError(f"{len(wrong)} tensors of factors do not fit blocks of {block_size[0]} x {block_size[1]}: "
                          f"{abbreviated(wrong)}",
                          fix=f"correct weight_block_size in config.json; known dtypes are {', '.join(_FACTOR_DTYPES)}")
