"""What structured output costs: one engine at batch 16, every answer held to a JSON schema, beside free answers.

`python benchmarks/structured.py [--batch-size 16] [--tokens 96] [--repeats 6] [--max-length 60] [--xgrammar PYTHON]`
One engine in this process, with `small-152k` of make_checkpoint.py and a vocabulary of as many tokens: bytes, and the
words of Python's own sources. Its weights are random, so its likeliest token is hardly ever one that the schema allows:
that is the worst case. Free and held batches take turns; the figure is the ratio of the medians of their decode
tokens/s, and of their shortest steps, which other work on the machine disturbs least.
Before that, sampling alone, of random logits along documents that follow the schema: the processor time of a step, of
all threads, free and held. And masks alone: the time of one with llguidance, and with xgrammar where an interpreter
that has it is named, for the same schema, vocabulary and tokens. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import torch
from engine import prompts_of
from engine_adapters import BLOCK_SIZE, MoesaicEngine, Timing
from machine import describe
from make_checkpoint import EOS, SHAPES, default_dir, make
from pydantic import JsonValue
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from model.grammar import GrammarMasks, GrammarTokenizer
from model.sampler import sample
from model.step import SamplingSpec, ScheduledRequest
from serving.ingress.build_request import SamplingFields
from serving.ingress.structured_output import grammar_of

MODEL = "small-152k"
INPUT_TOKENS = 64
TIME_LIMIT_S = 300.0
WORDS = re.compile(r" ?[A-Za-z]{1,24}| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]{1,8}|\s{1,24}")
SCHEMA: dict[str, JsonValue] = {
    "type": "array", "minItems": 1000, "items": {
        "type": "object", "additionalProperties": False,
        "required": ["name", "kind", "age", "tags", "address"],
        "properties": {
            "name": {"type": "string"},
            "kind": {"enum": ["person", "company", "place", "something else"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 4},
            "address": {"type": "object", "additionalProperties": False, "required": ["street", "number"],
                        "properties": {"street": {"type": "string"}, "number": {"type": "number"}}}}}}


def with_max_length(schema: JsonValue, max_length: int | None) -> JsonValue:
    """Return the schema, all its strings bounded."""
    if isinstance(schema, list):
        return [with_max_length(part, max_length) for part in schema]
    if not isinstance(schema, dict):
        return schema
    bound: dict[str, JsonValue] = {"maxLength": max_length} if schema.get("type") == "string" and max_length else {}
    return {name: with_max_length(part, max_length) for name, part in schema.items()} | bound


def vocabulary(num_tokens: int) -> str:
    """Return a tokenizer.json of so many tokens: words of the sources that are installed here."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    counts: Counter[str] = Counter()
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(root).rglob("*.py")):
            counts.update(WORDS.findall(path.read_text(encoding="utf-8", errors="ignore")))
            if len(counts) > num_tokens:
                break
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()),
             *("".join(part for part, _ in byte_level.pre_tokenize_str(word)) for word, _ in counts.most_common())]
    ids = {name: index for index, name in enumerate(list(dict.fromkeys([EOS, *names]))[:num_tokens])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    return str(tokenizer.to_str())


def documents(tokenizer_json: str, num: int) -> list[list[int]]:
    """Return the tokens of documents that follow the schema, each the longest that fits."""
    ids: dict[str, int] = json.loads(tokenizer_json)["model"]["vocab"]
    byte_level, longest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), max(map(len, ids))
    found = []
    for seed in range(num):
        items = [{"name": f"Ada Lovelace {seed}", "kind": "something else", "age": (seed + age) % 121,
                  "tags": ["mathematician", "first"], "address": {"street": "St James's Square", "number": 12.5}}
                 for age in range(8)]
        text = "".join(part for part, _ in byte_level.pre_tokenize_str(json.dumps(items).removesuffix("]")))
        token_ids, start = [], 0
        while start < len(text):
            end = next(end for end in range(min(len(text), start + longest), start, -1) if text[start:end] in ids)
            token_ids.append(ids[text[start:end]])
            start = end
        found.append(token_ids)
    return found


def run_engine(options: argparse.Namespace, tokenizer: GrammarTokenizer, grammar: str) -> dict[str, object]:
    """Return the figures of free and held batches, which took turns."""
    folder = default_dir(MODEL)
    if not folder.exists():
        make(MODEL, folder)
    size = options.batch_size
    engine = MoesaicEngine(folder, options.threads, size * (INPUT_TOKENS + options.tokens + BLOCK_SIZE), "cpu",
                           "bfloat16")
    engine.runner.grammars = GrammarMasks(tokenizer, engine.vocab_size)
    runs: dict[str, list[Timing]] = {"": [], grammar: []}
    for repeat in range(options.repeats + 1):
        for held_to in runs if repeat % 2 == 0 else reversed(runs):
            prompts = prompts_of(size, INPUT_TOKENS, engine.vocab_size, repeat)
            timing = engine.generate(prompts, options.tokens, TIME_LIMIT_S, held_to)
            runs[held_to] += [timing] * (repeat > 0)        # the first warms up
            print(f"{'held' if held_to else 'free'}: {timing.num_decoded / timing.decode_s:.1f} tokens/s, shortest "
                  f"step {(timing.best_step_s or 0) * 1e3:.1f} ms", file=sys.stderr)
    engine.close()
    speeds = [statistics.median(run.num_decoded / run.decode_s for run in runs[kind]) for kind in runs]
    steps_s = [min(run.best_step_s or 0.0 for run in runs[kind]) for kind in runs]
    return {"free_tokens_per_s": round(speeds[0], 1), "held_tokens_per_s": round(speeds[1], 1),
            "held_over_free": round(speeds[1] / speeds[0], 3), "free_best_step_ms": round(steps_s[0] * 1e3, 2),
            "held_best_step_ms": round(steps_s[1] * 1e3, 2),
            "best_step_free_over_held": round(steps_s[0] / steps_s[1], 3)}


def run_sampling(options: argparse.Namespace, tokenizer: GrammarTokenizer, grammar: str) -> dict[str, float]:
    """Return the processor time of drawing for one step, masks included, without a model."""
    written, num_ids = documents(tokenizer.json, options.batch_size), SHAPES[MODEL].vocab_size
    masks = GrammarMasks(tokenizer, num_ids)
    logits = torch.randn(options.batch_size, num_ids, generator=torch.Generator().manual_seed(0))
    costs_us: dict[str, list[float]] = {"": [], grammar: []}
    for length in range(min(map(len, written))):
        for held_to, found in costs_us.items():
            spec = SamplingSpec(temperature=0.0, grammar=held_to)
            requests = [ScheduledRequest(str(row), (1,), length, (), spec, (1,), tuple(token_ids[:length]))
                        for row, token_ids in enumerate(written)]
            began_s = time.process_time()
            masks.begin(requests)
            sample(logits, requests, masks)
            found.append((time.process_time() - began_s) * 1e6)
    return {f"{'held' if held_to else 'free'}_sampling_cpu_us": round(statistics.median(found), 1)
            for held_to, found in costs_us.items()}


def run_masks(options: argparse.Namespace, tokenizer: GrammarTokenizer) -> dict[str, object]:
    """Return the microseconds of a mask, by library."""
    work = json.dumps({"tokenizer": tokenizer.json, "eos": tokenizer.eos_token_ids[0],
                       "schema": with_max_length(SCHEMA, options.max_length),
                       "documents": documents(tokenizer.json, options.batch_size)})
    pythons = {"llguidance": sys.executable, **({"xgrammar": options.xgrammar} if options.xgrammar else {})}
    found: dict[str, object] = {}
    for library, python in pythons.items():
        done = subprocess.run([python, str(Path(__file__).with_name("mask_times.py")), library], input=work, text=True,
                              stdout=subprocess.PIPE, check=True, timeout=TIME_LIMIT_S)
        found[library] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--repeats", type=int, default=6, help="0: without the engine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-length", type=int, help="of strings; default: without")
    parser.add_argument("--xgrammar", metavar="PYTHON", help="an interpreter with xgrammar; default: without it")
    options = parser.parse_args()
    tokenizer = GrammarTokenizer(vocabulary(SHAPES[MODEL].vocab_size), (0,))
    schema = with_max_length(SCHEMA, options.max_length)
    grammar = asyncio.run(grammar_of({"guided_json": schema}, SamplingFields()))
    assert grammar is not None
    masks = run_masks(options, tokenizer)
    print("\n".join(f"{library}: {figures}" for library, figures in masks.items()))
    sampling = run_sampling(options, tokenizer, grammar)
    print("\n".join(f"{name}: {value}" for name, value in sampling.items()))
    engine = run_engine(options, tokenizer, grammar) if options.repeats else {}
    print("\n".join(f"{name}: {value}" for name, value in engine.items()))
    print(json.dumps({"benchmark": "structured", "model": MODEL, "batch_size": options.batch_size,
                      "tokens": options.tokens, "threads": options.threads, "max_length": options.max_length,
                      "repeats": options.repeats,
                      **sampling, **engine, "masks": masks, "machine": describe()}))


if __name__ == "__main__":
    main()
