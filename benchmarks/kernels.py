"""Speed of the kernels of model/kernels beside torch's own: one linear layer and whole MoE layers, by number of rows.

Weights are read cold: calls go round over more weights, and other experts, than caches hold. GB/s counts the weights a
call needs, read once; GFLOP/s two operations for every multiplication. Best of the calls, because other work on the
machine only ever slows them down.

  python benchmarks/kernels.py --threads 2
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from machine import describe
from torch.nn import functional

from model.kernels.packed_cpu import PackedCpuKernels, PackedExperts

ROWS = (1, 2, 4, 8, 64, 512, 2048)
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
class Figure:
    what: str
    rows: int
    us: float
    gigabytes_per_s: float
    gflops: float


def best_s(calls: Sequence[Callable[[], object]], least_s: float = 0.4) -> float:
    best, start_s, turn = float("inf"), time.perf_counter(), 0
    while turn <= len(calls) or time.perf_counter() - start_s < least_s:
        before_s = time.perf_counter()
        calls[turn % len(calls)]()
        best = min(best, time.perf_counter() - before_s)
        turn += 1
    return best


def figure(what: str, rows: int, calls: Sequence[Callable[[], object]], num_bytes: float,
           num_products: float) -> Figure:
    seconds = best_s(calls)
    result = Figure(what, rows, round(seconds * 1e6, 1), round(num_bytes / seconds / 1e9, 2),
                    round(2 * num_products / seconds / 1e9, 1))
    print(f"| {what} | {rows} | {result.us:.0f} | {result.gigabytes_per_s:.1f} | {result.gflops:.0f} |", flush=True)
    return result


def linear_figures(kernels: PackedCpuKernels, out_features: int, in_features: int) -> list[Figure]:
    num_weights = out_features * in_features
    copies = int(COLD_BYTES // (2 * num_weights)) + 1
    bf16 = [torch.randn(out_features, in_features).bfloat16() for _ in range(copies)]
    packed = [kernels.new_linear(out_features, in_features, torch.bfloat16) for _ in range(copies)]
    for weight, values in zip(packed, bf16, strict=True):
        weight.load_rows(0, values)
    fp32 = [values.float() for values in bf16[:copies // 2 + 1]]
    figures, name = [], f"linear {in_features} -> {out_features}"
    for rows in ROWS:
        x = torch.randn(rows, in_features).bfloat16()
        for what, calls, num_bytes in (
                ("packed bf16", [partial(kernels.linear, x, weight) for weight in packed], 2 * num_weights),
                ("torch bf16", [partial(functional.linear, x, weight) for weight in bf16], 2 * num_weights),
                ("torch fp32", [partial(functional.linear, x.float(), weight) for weight in fp32], 4 * num_weights)):
            figures.append(figure(f"{name}, {what}", rows, calls, num_bytes, rows * num_weights))
    return figures


def new_layer(kernels: PackedCpuKernels, shape: MoeShape) -> PackedExperts:
    layer = kernels.new_experts(shape.num_experts, shape.intermediate, shape.hidden, torch.bfloat16)
    for slot in range(shape.num_experts):
        layer.load_gate(slot, torch.randn(shape.intermediate, shape.hidden) * shape.hidden ** -0.5)
        layer.load_up(slot, torch.randn(shape.intermediate, shape.hidden) * shape.hidden ** -0.5)
        layer.load_down(slot, torch.randn(shape.hidden, shape.intermediate) * shape.intermediate ** -0.5)
    return layer


def moe_figures(kernels: PackedCpuKernels, shape: MoeShape) -> list[Figure]:
    """Tokens pick experts at random; the calls share counts, in another order of the experts each."""
    expert_bytes = 6 * shape.hidden * shape.intermediate
    layers = [new_layer(kernels, shape) for _ in range(int(COLD_BYTES // (expert_bytes * shape.num_experts)) + 1)]
    figures = []
    for tokens in ROWS:
        rows = torch.randn(tokens * shape.experts_per_token, shape.hidden).bfloat16()
        scores = torch.rand(tokens, shape.num_experts)
        counts = torch.bincount(scores.topk(shape.experts_per_token).indices.flatten(), minlength=shape.num_experts)
        shuffled = [counts[torch.randperm(shape.num_experts)].tolist() for _ in range(16 if tokens <= 64 else 2)]
        calls = [partial(kernels.experts, rows, num_rows_E, layer) for num_rows_E in shuffled for layer in layers]
        figures.append(figure(f"experts of {shape.name}, packed bf16", tokens, calls,
                              expert_bytes * int((counts > 0).sum()), rows.shape[0] * expert_bytes / 2))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kernels = PackedCpuKernels()
    print("| what | rows or tokens | us | GB/s | GFLOP/s |\n|---|---|---|---|---|")
    figures = linear_figures(kernels, 4096, 1024)
    for shape in MOE_SHAPES:
        figures += moe_figures(kernels, shape)
    print(json.dumps({"benchmark": "kernels", "threads": options.threads, "kernels": kernels.name, **describe(),
                      "figures": [asdict(entry) for entry in figures]}))


if __name__ == "__main__":
    main()
