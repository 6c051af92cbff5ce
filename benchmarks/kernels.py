"""Speed of the kernels of model/kernels beside torch's own and beside what the machine gives at most (peaks.py): one
linear layer, whole MoE layers and gated DeltaNet, by number of rows.

Weights and states are read cold: calls go round over more of them, and other experts, than caches hold. GB/s counts the
weights a call needs, read once, states read and written; GFLOP/s two operations for every multiplication (of the
recurrence: four a token and element of the state). The best call of several rounds over all cases, as other work on
the machine only ever slows a call down; with one thread its CPU time counts, so that a busy machine disturbs less.

  python benchmarks/kernels.py --threads 2 [--only delta]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from machine import describe
from peaks import Peaks
from torch.nn import functional

from model.kernels.packed_cpu import PackedCpuKernels, PackedExperts
from model.kernels.protocol import AttentionBatch, DeltaNetGates

ROWS = (1, 2, 4, 8, 32, 64, 512, 2048)
COLD_BYTES = 300e6


@dataclass(frozen=True)
class MoeShape:
    name: str
    hidden: int
    intermediate: int
    num_experts: int
    experts_per_token: int


MOE_SHAPES = (MoeShape("small", 512, 256, 32, 4), MoeShape("medium", 1024, 384, 64, 8))


@dataclass(frozen=True)
class DeltaShape:
    """A gated DeltaNet layer."""

    name: str
    key_heads: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        return (2 * self.key_heads + self.heads) * self.head_dim

    @property
    def state_size(self) -> int:
        return self.heads * self.head_dim ** 2


DELTA_SHAPES = (DeltaShape("hybrid", 4, 8, 64), DeltaShape("Qwen3.5-35B-A3B", 16, 32, 128))
DELTA_ROWS = ((1, 1), (8, 1), (32, 1), (1, 64), (1, 2048), (4, 512))        # sequences, rows of each
CONV_KERNEL = 4


@dataclass
class Case:
    """`calls` do the same work on different weights; num_bytes of weights and num_products multiplications each."""

    what: str
    rows: int
    calls: Sequence[Callable[[], object]]
    num_bytes: int
    num_products: int
    clock: Callable[[], float] = time.perf_counter
    num_done: int = 0
    best_s: float = float("inf")

    def run(self, least_s: float) -> None:
        start_s = before_s = self.clock()
        while before_s - start_s < least_s:
            self.calls[self.num_done % len(self.calls)]()
            after_s = self.clock()
            self.best_s = min(self.best_s, after_s - before_s)
            self.num_done, before_s = self.num_done + 1, after_s

    def figures(self) -> dict[str, object]:
        return {"what": self.what, "rows": self.rows, "us": round(self.best_s * 1e6, 1),
                "gigabytes_per_s": round(self.num_bytes / self.best_s / 1e9, 2),
                "gflops": round(2 * self.num_products / self.best_s / 1e9, 1)}


def peak_cases(num_threads: int) -> Iterator[Case]:
    peaks = Peaks(num_threads)
    yield Case("this machine: reading memory", 0, [peaks.read], peaks.num_bytes, 0)
    yield Case("this machine: fp32 FMA in registers", 0, [peaks.multiply], 0, peaks.num_fma)
    if peaks.has_dots:
        yield Case("this machine: bf16 dots in registers", 0, [peaks.multiply_pairs], 0, peaks.num_dot_products)


def linear_cases(kernels: PackedCpuKernels, out_features: int, in_features: int) -> Iterator[Case]:
    num_weights = out_features * in_features
    copies = int(COLD_BYTES // (2 * num_weights)) + 1
    bf16 = [torch.randn(out_features, in_features).bfloat16() for _ in range(copies)]
    packed = [kernels.new_linear(out_features, in_features, torch.bfloat16) for _ in range(copies)]
    for weight, values in zip(packed, bf16, strict=True):
        weight.load_rows(0, values)
    fp32 = [values.float() for values in bf16[:copies // 2 + 1]]
    name = f"linear {in_features} -> {out_features}"
    for rows in ROWS:
        x = torch.randn(rows, in_features).bfloat16()
        for what, calls, num_bytes in (
                ("packed bf16", [partial(kernels.linear, x, weight) for weight in packed], 2 * num_weights),
                ("torch bf16", [partial(functional.linear, x, weight) for weight in bf16], 2 * num_weights),
                ("torch fp32", [partial(functional.linear, x.float(), weight) for weight in fp32], 4 * num_weights)):
            yield Case(f"{name}, {what}", rows, calls, num_bytes, rows * num_weights)


def new_layer(kernels: PackedCpuKernels, shape: MoeShape) -> PackedExperts:
    layer = kernels.new_experts(shape.num_experts, shape.intermediate, shape.hidden, torch.bfloat16)
    for slot in range(shape.num_experts):
        layer.load_gate(slot, torch.randn(shape.intermediate, shape.hidden) * shape.hidden ** -0.5)
        layer.load_up(slot, torch.randn(shape.intermediate, shape.hidden) * shape.hidden ** -0.5)
        layer.load_down(slot, torch.randn(shape.hidden, shape.intermediate) * shape.intermediate ** -0.5)
    return layer


def moe_cases(kernels: PackedCpuKernels, shape: MoeShape) -> Iterator[Case]:
    """Return cases whose tokens pick experts at random; calls share counts, in another order of the experts each."""
    expert_bytes = 6 * shape.hidden * shape.intermediate
    layers = [new_layer(kernels, shape) for _ in range(int(COLD_BYTES // (expert_bytes * shape.num_experts)) + 1)]
    for tokens in ROWS:
        rows = torch.randn(tokens * shape.experts_per_token, shape.hidden).bfloat16()
        scores = torch.rand(tokens, shape.num_experts)
        counts = torch.bincount(scores.topk(shape.experts_per_token).indices.flatten(), minlength=shape.num_experts)
        shuffled = [counts[torch.randperm(shape.num_experts)].tolist() for _ in range(16 if tokens <= 64 else 2)]
        calls = [partial(kernels.experts, rows, num_rows_E, layer) for num_rows_E in shuffled for layer in layers]
        yield Case(f"experts of {shape.name}, packed bf16", tokens, calls, expert_bytes * int((counts > 0).sum()),
                   rows.shape[0] * expert_bytes // 2)


def delta_cases(kernels: PackedCpuKernels, shape: DeltaShape) -> Iterator[Case]:
    """The recurrence, the convolution before it and the norm behind it, of sequences that go on from a state; and
    copying such states."""
    slot_bytes = 4 * shape.state_size
    num_slots = 2 * max(num_seqs for num_seqs, _ in DELTA_ROWS)
    layers = kernels.new_delta_net_states(int(COLD_BYTES // (num_slots * slot_bytes)) + 1, num_slots, shape.heads,
                                          shape.head_dim, shape.head_dim, CONV_KERNEL, shape.width, torch.bfloat16)
    for layer in layers:
        layer.recurrent_NHkv.normal_()
    gates = DeltaNetGates(-torch.rand(shape.heads), torch.randn(shape.heads))
    weight = torch.randn(CONV_KERNEL, shape.width).bfloat16()
    halves = [layer.recurrent_NHkv.chunk(2) for layer in layers]
    yield Case(f"copying states, {shape.name}", num_slots // 2, [partial(new.copy_, old) for old, new in halves],
               num_slots * slot_bytes, 0)
    for num_seqs, rows_each in DELTA_ROWS:
        num_rows, batch = num_seqs * rows_each, going_on(num_seqs, rows_each)
        qkv, ba = torch.randn(num_rows, shape.width).bfloat16(), torch.randn(num_rows, 2 * shape.heads).bfloat16()
        name = f"{shape.name}, {num_seqs} x {rows_each}"
        yield Case(f"delta rule, {name}", num_rows, [
            partial(kernels.gated_delta_rule, qkv, ba, gates, layer, batch) for layer in layers],
            2 * num_seqs * slot_bytes, 4 * num_rows * shape.state_size)
        yield Case(f"convolution, {name}", num_rows, [
            partial(kernels.causal_conv, qkv, weight, layer, batch) for layer in layers],
            4 * num_rows * shape.width, CONV_KERNEL * num_rows * shape.width)
        heads, norm = torch.randn(2, num_rows, shape.heads, shape.head_dim).bfloat16(), torch.ones(shape.head_dim)
        yield Case(f"gated norm, {name}", num_rows, [
            partial(kernels.gated_rms_norm, heads[0], heads[1], norm.bfloat16(), 1e-6)],
            6 * heads[0].numel(), 2 * heads[0].numel())
    yield chunked_case(shape, 2048)


def chunked_case(shape: DeltaShape, num_rows: int) -> Case:
    """The rule in chunks of 64 tokens by matrix products, in fp32 as transformers has it in torch. It depends on where
    chunks begin."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    q, k, v = torch.randn(3, 1, num_rows, shape.heads, shape.head_dim).unbind(0)
    log_decay, beta = -torch.rand(1, num_rows, shape.heads), torch.rand(1, num_rows, shape.heads)
    call = partial(torch_chunk_gated_delta_rule, q, k, v, log_decay, beta, output_final_state=True,
                   use_qk_l2norm_in_kernel=True)
    return Case(f"delta rule in chunks, torch, {shape.name}, 1 x {num_rows}", num_rows, [call],
                2 * 4 * shape.state_size, 4 * num_rows * shape.state_size)


def going_on(num_seqs: int, rows_each: int) -> AttentionBatch:
    """Return a step in which each sequence reads one slot and writes another one."""
    none, slots = torch.empty(0, dtype=torch.int32), torch.arange(2 * num_seqs, dtype=torch.int32)
    return AttentionBatch(torch.arange(num_seqs + 1, dtype=torch.int32) * rows_each, none, none, none, none.long(),
                          state_reads_S=slots[:num_seqs].clone(), state_writes_S=slots[num_seqs:].clone())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--round-s", type=float, default=0.1, help="seconds for each case in each round")
    parser.add_argument("--only", choices=["linear", "experts", "delta"], help="leave the others out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)      # for the rule in chunks
    torch.manual_seed(0)
    kernels = PackedCpuKernels(options.threads)
    cases = list(peak_cases(options.threads))
    if options.only in (None, "linear"):
        cases += linear_cases(kernels, 4096, 1024)
    for moe_shape in MOE_SHAPES if options.only in (None, "experts") else ():
        cases += moe_cases(kernels, moe_shape)
    for delta_shape in DELTA_SHAPES if options.only in (None, "delta") else ():
        cases += delta_cases(kernels, delta_shape)
    for case in cases if options.threads == 1 else ():
        case.clock = time.thread_time
    for _ in range(options.rounds):
        for case in cases:
            case.run(options.round_s)
    print("| what | rows or tokens | us | GB/s | GFLOP/s |\n|---|---|---|---|---|")
    for case in cases:
        print("| {what} | {rows} | {us:.0f} | {gigabytes_per_s:.1f} | {gflops:.0f} |".format_map(case.figures()))
    print(json.dumps({"benchmark": "kernels", "threads": options.threads, "kernels": kernels.name, **describe(),
                      "figures": [case.figures() for case in cases]}))


if __name__ == "__main__":
    main()
