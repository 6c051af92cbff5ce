"""Adapters of other engines for CPUs. benchmarks/README.md says how to install them: each needs an environment of its
own, and engine.py runs this file there (--python ENGINE=PATH). Loading it loads none of them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_adapters import Greedy, Timing, timing_of

MAX_BATCH_TOKENS = 2048
KV_CACHE_GIB = 2


def context_of(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config["max_position_embeddings"])


# ==== vLLM: its offline interface, two runs, as it does not tell when a token came ====


class VllmEngine:
    def __init__(self, folder: Path, num_threads: int, num_kv_tokens: int, device: str, dtype: str) -> None:
        if device == "cpu":
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{num_threads - 1}")
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(KV_CACHE_GIB))
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"      # one process, whose memory is the engine's
        # It looks for packages whose names are those of files here, such as `kernels`.
        sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
        try:
            from vllm import LLM
        except ImportError as error:
            raise SystemExit(f"vllm cannot be imported ({error}): install it as benchmarks/README.md says, "
                             "and give its interpreter: --python vllm=PATH") from error
        self._llm = LLM(str(folder), dtype=dtype, enable_prefix_caching=False, skip_tokenizer_init=True,
                        max_model_len=min(num_kv_tokens, context_of(folder)), max_num_batched_tokens=MAX_BATCH_TOKENS)
        self.vocab_size = self._llm.llm_engine.model_config.get_vocab_size()

    def generate(self, prompts: Sequence[tuple[int, ...]], num_tokens: int, time_limit_s: float) -> Timing:
        prefill_s, _ = self._timed(prompts, 1)
        if num_tokens == 1:
            return Timing(prefill_s, 0.0, 0)
        whole_s, _ = self._timed(prompts, num_tokens)
        return Timing(prefill_s, whole_s - prefill_s, (num_tokens - 1) * len(prompts))

    def greedy(self, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> Greedy:
        return Greedy(self._timed(prompts, num_tokens)[1])

    def _timed(self, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> tuple[float, list[list[int]]]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        start_s = time.perf_counter()
        outputs = self._llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
        return time.perf_counter() - start_s, [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        pass


# ==== llama.cpp: its C interface by ctypes, one llama_decode a step, all sequences in it ====


class LlamaCppEngine:
    """Reads model.gguf, which make_checkpoint.py --gguf writes beside the checkpoint."""

    def __init__(self, folder: Path, num_threads: int, num_kv_tokens: int, device: str, dtype: str) -> None:
        if (device, dtype) != ("cpu", "bfloat16"):
            raise SystemExit("--engine llamacpp is measured with --device cpu --dtype bfloat16: its file is bf16")
        path = folder / "model.gguf"
        if not path.exists():
            raise SystemExit(f"{path} is not there: write it with make_checkpoint.py NAME --gguf")
        try:
            import llama_cpp
        except ImportError as error:
            raise SystemExit(f"llama_cpp cannot be imported ({error}): install it as benchmarks/README.md says, "
                             "and give its interpreter: --python llamacpp=PATH") from error
        self._lib: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, user_pointer: None)
        llama_cpp.llama_log_set(self._quiet, None)
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}: write it again with --gguf")
        self._num_threads, self._num_kv_tokens = num_threads, num_kv_tokens
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(MAX_BATCH_TOKENS, 0, 1)

    def generate(self, prompts: Sequence[tuple[int, ...]], num_tokens: int, time_limit_s: float) -> Timing:
        context = self._new_context(len(prompts), max(map(len, prompts)) + num_tokens)
        start_s = time.perf_counter()
        steps = self._steps(context, prompts, num_tokens, start_s + time_limit_s)
        self._lib.llama_free(context)
        return timing_of(start_s, [[moment for moment, _ in steps]] * len(prompts))

    def greedy(self, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> Greedy:
        context = self._new_context(len(prompts), max(map(len, prompts)) + num_tokens)
        steps = self._steps(context, prompts, num_tokens, float("inf"))
        self._lib.llama_free(context)
        return Greedy([list(drawn) for drawn in zip(*(token_ids for _, token_ids in steps), strict=True)])

    def _new_context(self, num_sequences: int, tokens_each: int) -> Any:
        """Make a context with room for the batch: untimed. Caches are one for each sequence, its default."""
        params = self._lib.llama_context_default_params()
        blocks = -(-tokens_each // 256) * 256           # llama.cpp pads a cache to 256 tokens
        params.n_ctx = min(blocks, -(-self._num_kv_tokens // 256) * 256) * num_sequences
        params.n_seq_max = num_sequences
        params.n_batch = MAX_BATCH_TOKENS
        params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = self._num_threads
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise SystemExit(f"llama.cpp makes no context of {params.n_ctx} tokens")
        return context

    def _steps(self, context: Any, prompts: Sequence[tuple[int, ...]], num_tokens: int,
               until_s: float) -> list[tuple[float, list[int]]]:
        """Decode -> of each step when it ended, and the token of each sequence."""
        drawn = self._prefill(context, prompts)
        steps = [(time.perf_counter(), drawn)]
        while len(steps) < num_tokens and time.perf_counter() < until_s:
            rows = [(drawn[sequence], len(prompt) + len(steps) - 1, sequence, True)
                    for sequence, prompt in enumerate(prompts)]
            drawn = self._decode(context, rows)
            steps.append((time.perf_counter(), drawn))
        return steps

    def _prefill(self, context: Any, prompts: Sequence[tuple[int, ...]]) -> list[int]:
        rows = [(token_id, position, sequence, position == len(prompt) - 1)
                for sequence, prompt in enumerate(prompts) for position, token_id in enumerate(prompt)]
        return [token_id for begin in range(0, len(rows), MAX_BATCH_TOKENS)
                for token_id in self._decode(context, rows[begin:begin + MAX_BATCH_TOKENS])]

    def _decode(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute rows of (token id, position, sequence, draws a token) -> the likeliest token of those that draw."""
        import numpy as np

        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token_id, position, sequence, draws) in enumerate(rows):
            batch.token[index], batch.pos[index] = token_id, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = draws
        if self._lib.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed: no room in its cache")
        return [int(np.ctypeslib.as_array(self._lib.llama_get_logits_ith(context, index), (self.vocab_size,)).argmax())
                for index, row in enumerate(rows) if row[3]]

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_model_free(self._model)
