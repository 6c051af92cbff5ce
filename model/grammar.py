"""Which tokens a grammar allows next, by llguidance. What a sequence has committed is all that its state depends on.

Grammars are compiled on one thread, so that no step waits for that, and masks are computed on another, beside the
forward of the step that they are for. llguidance lets go of the GIL in both, but not while it reads a tokenizer.

V vocabulary
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from model.errors import GrammarError
from model.step import ScheduledRequest
from model.token_mask import TokenMask

logger = logging.getLogger(__name__)

_MAX_HELD = 1024        # states of sequences; one that was let go is made again of its tokens


@dataclass(frozen=True, slots=True)
class GrammarTokenizer:
    json: str                           # as the tokenizers library writes it
    eos_token_ids: tuple[int, ...]      # one of them follows what is complete


class GrammarMasks:
    """The grammars of one shard's sequences. `prepare` may be called on any thread, the rest on the model thread."""

    def __init__(self, tokenizer: GrammarTokenizer, vocab_size: int) -> None:
        """Read the tokenizer: a second or so in which no other Python code of the process runs. Raises ValueError."""
        try:
            self._tokenizer = LLTokenizer(tokenizer.json, eos_token=list(tokenizer.eos_token_ids))
        except BaseException as error:      # a panic of llguidance, as a token of 1000 bytes makes, is no Exception
            raise ValueError(f"llguidance cannot read the tokenizer: {error}") from error
        self._vocab_size = vocab_size
        self._states: OrderedDict[str, tuple[LLMatcher, tuple[int, ...]]] = OrderedDict()
        self._compile_thread = ThreadPoolExecutor(1, "grammar-compile")
        self._mask_thread = ThreadPoolExecutor(1, "grammar-mask")
        self._masks = self._mask_thread.submit(dict[str, TokenMask | BaseException])       # of the step that runs

    def prepare(self, request_id: str, grammar: str, output_token_ids: tuple[int, ...]) -> Future[None]:
        """Compile a sequence's grammar, up to behind its output. The future raises GrammarError."""
        return self._compile_thread.submit(self._prepare, request_id, grammar, output_token_ids)

    def begin(self, requests: Iterable[ScheduledRequest]) -> None:
        """Begin to compute the masks of a step's requests that draw under a grammar."""
        held = [request for request in requests if request.sampling is not None and request.sampling.grammar]
        if held:
            self._masks = self._mask_thread.submit(self._compute_all, held)

    def mask(self, request: ScheduledRequest) -> TokenMask:
        """Return what may follow the output of a request that was begun, when the step's masks are computed. Raises
        GrammarError where the grammar fails, which must not look like an end of the answer."""
        mask = self._masks.result()[request.request_id]
        if isinstance(mask, BaseException):
            logger.warning("grammar_mask_failed request_id=%s", request.request_id, exc_info=mask)
            raise GrammarError(f"the output format failed: {str(mask)[:300]}", fix="make it simpler") from mask
        return mask

    def _compute_all(self, requests: list[ScheduledRequest]) -> dict[str, TokenMask | BaseException]:
        """Compute the masks, one after the other; a grammar that fails is its own request's fault only."""
        found: dict[str, TokenMask | BaseException] = {}
        for request in requests:
            try:
                found[request.request_id] = self._compute(request)
            except BaseException as error:      # a panic of llguidance is no Exception
                found[request.request_id] = error
        return found

    def _prepare(self, request_id: str, grammar: str, output_token_ids: tuple[int, ...]) -> None:
        try:
            matcher = LLMatcher(self._tokenizer, grammar)
            fault = matcher.get_error() if matcher.is_error() else ""
            matcher.consume_tokens(list(output_token_ids))
        except BaseException as error:      # as above
            fault = str(error)
        if fault:
            raise GrammarError(f"the grammar cannot be compiled: {fault[:300]}", fix="make it simpler")
        self._keep(request_id, matcher, output_token_ids)

    def _compute(self, request: ScheduledRequest) -> TokenMask:
        matcher = self._at(request)
        if matcher.is_stopped() and not matcher.is_error():
            return self._only_end()         # what is complete and cannot go on
        words = np.zeros(-(-self._tokenizer.vocab_size // 32), dtype=np.int32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        bits_V = np.unpackbits(words.view(np.uint8), count=self._vocab_size, bitorder="little")     # cut, or filled up
        return TokenMask.of(bits_V.view(np.bool_))

    def _only_end(self) -> TokenMask:
        is_allowed_V = np.zeros(self._vocab_size, dtype=np.bool_)
        is_allowed_V[self._tokenizer.eos_tokens] = True
        return TokenMask.of(is_allowed_V)

    def _at(self, request: ScheduledRequest) -> LLMatcher:
        """Return the matcher behind the request's output."""
        output = request.output_token_ids
        assert request.sampling is not None
        # Taken out while it is used: nobody else can come to use it.
        matcher, consumed = self._states.pop(request.request_id, (None, ()))
        if matcher is None or consumed != output[:len(consumed)]:       # let go, or goes on from an older journal
            matcher, consumed = LLMatcher(self._tokenizer, request.sampling.grammar), ()
        matcher.consume_tokens(list(output[len(consumed):]))
        self._keep(request.request_id, matcher, output)
        return matcher

    def _keep(self, request_id: str, matcher: LLMatcher, output_token_ids: tuple[int, ...]) -> None:
        self._states[request_id] = (matcher, output_token_ids)
        if len(self._states) > _MAX_HELD:
            self._states.popitem(last=False)
