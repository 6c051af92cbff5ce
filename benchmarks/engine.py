"""Speed of one engine on one device, in one process, without a server.

Decode tokens/s at several batch sizes, prefill tokens/s, time to the first token from process start, peak memory.
`--compare transformers,vllm` runs the engines one after the other, --repeats times, each time in a new process, and
prints medians and ratios; of the figures called best, the best. Those are for machines that are not idle: other work
only ever slows a step down. It also says how far all engines agree on greedy text.

An engine that has an environment of its own runs in that one's interpreter: `--python vllm=PATH`. See README.md.

  python benchmarks/engine.py --model DIR --engine moesaic --threads 2
  python benchmarks/engine.py --model DIR --compare transformers --repeats 3
  python benchmarks/engine.py --model DIR --compare vllm,llamacpp --python vllm=/peers/vllm/bin/python \\
      --python llamacpp=/peers/llamacpp/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from engine_adapters import BLOCK_SIZE, BenchEngine, Greedy, MoesaicEngine, TransformersEngine
from engine_peers import LlamaCppEngine, VllmEngine
from machine import describe

ENGINES: dict[str, Callable[[Path, int, int, str, str], BenchEngine]] = {
    "moesaic": MoesaicEngine, "transformers": TransformersEngine, "vllm": VllmEngine, "llamacpp": LlamaCppEngine}
SAME_PROMPTS, SAME_INPUT, SAME_TOKENS = 4, 64, 16      # of the greedy text that engines are compared by
TIE = 0.05                      # a token that is so little likelier than the next may be the other one elsewhere


def prompts_of(num: int, num_tokens: int, vocab_size: int, seed: int) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.choices(range(3, vocab_size), k=num_tokens)) for _ in range(num)]


def measure(options: argparse.Namespace) -> tuple[dict[str, float], Greedy]:
    """Return all figures of one engine in this process, and its text. `..._s`, `..._tokens_per_s`, `..._bytes`."""
    num_kv_tokens = max(max(options.batch_sizes) * (options.input_tokens + options.output_tokens + BLOCK_SIZE),
                        options.prefill_tokens + 2 * BLOCK_SIZE)
    engine = ENGINES[options.engine](options.model, options.threads, num_kv_tokens, options.device, options.dtype)
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
    greedy = engine.greedy(prompts_of(SAME_PROMPTS, SAME_INPUT, engine.vocab_size, 7), SAME_TOKENS)
    engine.close()
    figures[f"prefill_{options.prefill_tokens}_tokens_per_s"] = options.prefill_tokens / statistics.median(prefills_s)
    figures[f"prefill_{options.prefill_tokens}_best_tokens_per_s"] = options.prefill_tokens / min(prefills_s)
    figures["peak_memory_bytes"] = max(
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024.0
    if options.device.startswith("cuda"):
        import torch
        figures["peak_device_memory_bytes"] = float(torch.cuda.max_memory_allocated())
    return {name: round(value, 3) for name, value in figures.items()}, greedy


def compare(options: argparse.Namespace) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Return medians by engine over interleaved runs, the first engine's over each other's, and how texts agree."""
    engines = [options.engine, *options.compare]
    runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    texts: dict[str, Greedy] = {}
    for repeat in range(options.repeats):
        for engine in engines if repeat % 2 == 0 else reversed(engines):
            figures, texts[engine] = run_alone(engine, options)
            runs[engine].append(figures)
    medians = {engine: {name: (max if "_best_" in name else statistics.median)(
                            [run[name] for run in runs[engine] if name in run])
                        for name in dict.fromkeys(name for run in runs[engine] for name in run)}
               for engine in engines}
    ours = medians[options.engine]
    ratios = {f"{options.engine}/{peer}": {name: round(ours[name] / medians[peer][name], 3)
                                           for name in ours if medians[peer].get(name)} for peer in options.compare}
    return {**medians, **ratios}, {peer: agreement(texts[options.engine], texts[peer]) for peer in options.compare}


def agreement(ours: Greedy, theirs: Greedy) -> str:
    """Say whether both texts are the same. A first difference at a tie is none: whatever follows it differs."""
    others = 0
    ties = 0
    for index, (one, other) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
        at = next((place for place, (ours_id, its_id) in enumerate(zip(one, other, strict=True)) if ours_id != its_id),
                  None)
        if at is not None:
            is_tie = ours.margins is not None and ours.margins[index][at] < TIE
            ties, others = ties + is_tie, others + (not is_tie)
    if not ties and not others:
        return "same"
    return f"{len(ours.token_ids)} texts: {ties} differ from a tie on, {others} otherwise"


def run_alone(engine: str, options: argparse.Namespace) -> tuple[dict[str, float], Greedy]:
    """Run one engine in a new process, in its own interpreter where it has one, with the same options."""
    command = [options.python.get(engine, sys.executable), __file__, "--model", str(options.model), "--engine", engine,
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
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer["figures"], Greedy(**answer["greedy"])


def python_of(text: str) -> tuple[str, str]:
    engine, equals, path = text.partition("=")
    if engine not in ENGINES or not equals or not os.access(path, os.X_OK):
        raise argparse.ArgumentTypeError(f"{text!r}: give ENGINE=PATH of an interpreter, as vllm=/peers/bin/python")
    return engine, path


def engines_of(text: str) -> list[str]:
    unknown = [name for name in text.split(",") if name not in ENGINES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: engines are {', '.join(sorted(ENGINES))}")
    return text.split(",")


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
    parser.add_argument("--compare", type=engines_of, metavar="ENGINE[,ENGINE]",
                        help="measure these too, interleaved")
    parser.add_argument("--python", type=python_of, action="append", default=[], metavar="ENGINE=PATH",
                        help="interpreter of an engine; default: this one")
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
    options = parser.parse_args()
    options.python = dict(options.python)
    return options


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # what was started is ended on the way out
    options = parse_options()
    about = {"benchmark": "engine", "model": options.model.name, "threads": options.threads, "device": options.device,
             "dtype": options.dtype, "input_tokens": options.input_tokens, "output_tokens": options.output_tokens}
    if options.compare:
        columns, same = compare(options)
        print_table(columns)
        print("\n".join(f"greedy text beside {peer}: {how}" for peer, how in same.items()))
        print(json.dumps({**about, "repeats": options.repeats, **columns, "greedy": same, "machine": describe()}))
    elif options.engine in options.python:
        figures, greedy = run_alone(options.engine, options)
        finish(options, about, figures, greedy)
    else:
        finish(options, about, *measure(options))


def finish(options: argparse.Namespace, about: dict[str, object], figures: dict[str, float], greedy: Greedy) -> None:
    print_table({options.engine: figures})
    print(json.dumps({**about, "engine": options.engine, "figures": figures, "greedy": asdict(greedy),
                      "machine": describe()}))


if __name__ == "__main__":
    main()
