"""Speed of one engine on one device, in one process, without a server.

Decode tokens/s at several batch sizes, prefill tokens/s, time to the first token from process start, peak memory.
`--compare transformers` runs both engines one after the other, --repeats times, each time in a new process, and prints
medians and ratios; of the figures called best, the best. Those are for machines that are not idle: other work only ever
slows a step down.

  python benchmarks/engine.py --model DIR --engine moesaic --threads 2
  python benchmarks/engine.py --model DIR --compare transformers --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
from engine_adapters import BLOCK_SIZE, ENGINES, BenchEngine
from machine import describe


def prompts_of(num: int, num_tokens: int, vocab_size: int, seed: int) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.choices(range(3, vocab_size), k=num_tokens)) for _ in range(num)]


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Return all figures of one engine in this process. `..._s` seconds, `..._tokens_per_s`, `..._bytes`."""
    num_kv_tokens = max(max(options.batch_sizes) * (options.input_tokens + options.output_tokens + BLOCK_SIZE),
                        options.prefill_tokens + 2 * BLOCK_SIZE)
    engine: BenchEngine = ENGINES[options.engine](options.model, options.threads, num_kv_tokens, options.device,
                                                  options.dtype)
    figures = {"load_from_process_start_s": time.time() - psutil.Process().create_time()}
    limit_s = options.time_limit_s
    engine.generate(prompts_of(1, options.input_tokens, engine.vocab_size, 0), 1, limit_s)
    figures["first_token_from_process_start_s"] = time.time() - psutil.Process().create_time()
    engine.generate(prompts_of(2, 16, engine.vocab_size, 1), 8, limit_s)
    for seed, batch_size in enumerate(options.batch_sizes, start=2):
        prompts = prompts_of(batch_size, options.input_tokens, engine.vocab_size, seed)
        timing = engine.generate(prompts, options.output_tokens, limit_s)
        if timing.decode_tokens_per_s is not None:
            figures[f"decode_batch_{batch_size}_tokens_per_s"] = timing.decode_tokens_per_s
        if timing.best_step_s is not None:
            figures[f"decode_batch_{batch_size}_best_step_tokens_per_s"] = batch_size / timing.best_step_s
        print(f"{options.engine}: batch {batch_size}: {timing.num_decoded} tokens in {timing.decode_s:.2f} s",
              file=sys.stderr)
    prefills_s = [engine.generate(prompts_of(1, options.prefill_tokens, engine.vocab_size, 100 + turn), 1,
                                  limit_s).prefill_s for turn in range(options.prefill_turns)]
    engine.close()
    figures[f"prefill_{options.prefill_tokens}_tokens_per_s"] = options.prefill_tokens / statistics.median(prefills_s)
    figures[f"prefill_{options.prefill_tokens}_best_tokens_per_s"] = options.prefill_tokens / min(prefills_s)
    figures["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    if options.device.startswith("cuda"):
        import torch
        figures["peak_device_memory_bytes"] = float(torch.cuda.max_memory_allocated())
    return {name: round(value, 3) for name, value in figures.items()}


def compare(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return medians by engine over interleaved runs, and the first engine's over the second's."""
    engines = [options.engine, options.compare]
    runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for repeat in range(options.repeats):
        for engine in engines if repeat % 2 == 0 else reversed(engines):
            runs[engine].append(run_alone(engine, options))
    medians = {engine: {name: (max if "_best_" in name else statistics.median)(
                            [run[name] for run in runs[engine] if name in run])
                        for name in dict.fromkeys(name for run in runs[engine] for name in run)}
               for engine in engines}
    ours, theirs = (medians[engine] for engine in engines)
    ratio = {name: round(ours[name] / theirs[name], 3) for name in ours if theirs.get(name)}
    return {**medians, "ratio": ratio}


def run_alone(engine: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one engine in a new process, with the same options."""
    command = [sys.executable, __file__, "--model", str(options.model), "--engine", engine,
               "--threads", str(options.threads), "--device", options.device, "--dtype", options.dtype,
               "--batch-sizes", ",".join(map(str, options.batch_sizes)),
               "--input-tokens", str(options.input_tokens), "--output-tokens", str(options.output_tokens),
               "--prefill-tokens", str(options.prefill_tokens), "--prefill-turns", str(options.prefill_turns),
               "--time-limit-s", str(options.time_limit_s)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    # Every timed call is bounded by the limit, and so the whole is: loading, batches, prefills, and some air.
    timeout_s = options.time_limit_s * (len(options.batch_sizes) + options.prefill_turns + 5)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, timeout=timeout_s)
    if done.returncode != 0:
        raise SystemExit(f"--engine {engine} failed, see above")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])["figures"]
    return figures


def print_table(columns: dict[str, dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    print("| figure | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in names:
        cells = [f"{column[name]:,.2f}" if name in column else "" for column in columns.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="moesaic")
    parser.add_argument("--compare", choices=sorted(ENGINES), help="measure this one too, interleaved")
    parser.add_argument("--repeats", type=int, default=3, help="with --compare")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--batch-sizes", type=lambda text: [int(size) for size in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--prefill-tokens", type=int, default=2048)
    parser.add_argument("--prefill-turns", type=int, default=3)
    parser.add_argument("--time-limit-s", type=float, default=120.0, help="of one batch; decoding stops there")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    about = {"benchmark": "engine", "model": options.model.name, "threads": options.threads, "device": options.device,
             "dtype": options.dtype, "input_tokens": options.input_tokens, "output_tokens": options.output_tokens}
    if options.compare:
        columns = compare(options)
        print_table(columns)
        print(json.dumps({**about, "repeats": options.repeats, **columns, "machine": describe()}))
    else:
        figures = measure(options)
        print_table({options.engine: figures})
        print(json.dumps({**about, "engine": options.engine, "figures": figures, "machine": describe()}))


if __name__ == "__main__":
    main()
