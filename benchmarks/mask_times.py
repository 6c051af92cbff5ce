"""The processor time of a mask, by one library of grammars, in whichever interpreter has it: `mask_times.py LIBRARY`.

Reads a tokenizer, a JSON schema and documents' tokens from stdin. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Begin = Callable[[], tuple[Callable[[], None], Callable[[int], bool]]]      # of a document: make a mask, take a token


def llguidance(work: dict[str, Any]) -> Begin:
    from llguidance import LLMatcher, LLTokenizer

    tokenizer = LLTokenizer(work["tokenizer"], eos_token=work["eos"])
    grammar = LLMatcher.grammar_from_json_schema(work["schema"])
    words = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.int32)

    def begin() -> tuple[Callable[[], None], Callable[[int], bool]]:
        matcher = LLMatcher(tokenizer, grammar)
        return (lambda: matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes),
                lambda token_id: bool(matcher.consume_token(token_id)))
    return begin


def xgrammar(work: dict[str, Any]) -> Begin:
    import xgrammar as library

    ids: dict[str, int] = json.loads(work["tokenizer"])["model"]["vocab"]
    about = library.TokenizerInfo(sorted(ids, key=ids.__getitem__), library.VocabType.BYTE_LEVEL, vocab_size=len(ids),
                                  stop_token_ids=[work["eos"]])
    compiled = library.GrammarCompiler(about).compile_json_schema(json.dumps(work["schema"]))
    words = library.allocate_token_bitmask(1, len(ids))

    def begin() -> tuple[Callable[[], None], Callable[[int], bool]]:
        matcher = library.GrammarMatcher(compiled)
        return lambda: matcher.fill_next_token_bitmask(words), matcher.accept_token
    return begin


def main() -> None:
    work = json.loads(sys.stdin.read())
    began_s = time.perf_counter()
    begin = {"llguidance": llguidance, "xgrammar": xgrammar}[sys.argv[1]](work)
    ready_s = time.perf_counter() - began_s
    masks_us, takes_us, num_refused = [], [], 0
    for token_ids in work["documents"]:
        mask, take = begin()
        for token_id in token_ids:
            start_s = time.thread_time()
            mask()
            masked_s = time.thread_time()
            is_taken = take(token_id)
            masks_us.append((masked_s - start_s) * 1e6)
            takes_us.append((time.thread_time() - masked_s) * 1e6)
            if not is_taken:
                num_refused += 1
                break
    print(json.dumps({
        "ready_s": round(ready_s, 2), "num_masks": len(masks_us), "num_refused_documents": num_refused,
        "mask_p50_us": round(statistics.median(masks_us), 1), "mask_mean_us": round(statistics.mean(masks_us), 1),
        "mask_p99_us": round(statistics.quantiles(masks_us, n=100)[-1], 1),
        "take_p50_us": round(statistics.median(takes_us), 1)}))


if __name__ == "__main__":
    main()
