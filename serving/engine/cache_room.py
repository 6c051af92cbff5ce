"""How much one sequence may ask of a shard's caches, and the refusal of what can never fit. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from serving.engine.request import Submission
from serving.engine.state_slots import SLOTS_WITH_SNAPSHOT
from serving.errors import ContextLengthError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class CacheRoom:
    """The size of a shard's caches. Bytes are those of one block and one slot; 0: unknown, or no layer has a state."""

    max_model_len: int
    num_blocks: int
    block_size: int
    block_bytes: int = 0
    slot_bytes: int = 0

    @property
    def max_request_tokens(self) -> int:
        """Return the largest prompt + max_tokens that is accepted: the last token needs no place in the cache."""
        return min(self.max_model_len, self.num_blocks * self.block_size + 1)

    def check(self, submission: Submission) -> None:
        """Raise InvalidRequestError for what is no request, and ContextLengthError for what can never fit."""
        if not self.num_blocks:
            raise InvalidRequestError("this shard holds experts only and takes no requests",
                                      fix="send it to a shard that has a share of the requests")
        if not submission.prompt_token_ids:
            raise InvalidRequestError("the prompt has no tokens", fix="send at least one", param="prompt")
        if submission.max_tokens < 1:
            raise InvalidRequestError("max_tokens is below 1", fix="ask for at least 1", param="max_tokens")
        num_prompt, most = len(submission.prompt_token_ids), self.max_request_tokens
        num_tokens = num_prompt + submission.max_tokens
        if num_tokens > most:
            raise ContextLengthError(
                f"{num_prompt} prompt tokens + max_tokens={submission.max_tokens} make {num_tokens} tokens; at most "
                f"{most} fit (max_model_len={self.max_model_len}, KV cache {self.num_blocks}x{self.block_size} tokens"
                f"{self._missing_bytes(num_tokens)})",
                fix=f"shorten the prompt, or ask for at most {max(0, most - num_prompt)} tokens",
                param="max_tokens" if num_prompt < most else "prompt")

    def _missing_bytes(self, num_tokens: int) -> str:
        """Say what so many tokens take beside what there is, where that is known and too little."""
        needed = -(-(num_tokens - 1) // self.block_size) * self.block_bytes
        there = self.num_blocks * self.block_bytes
        if needed <= there:
            return ""
        states = f", beside {SLOTS_WITH_SNAPSHOT * self.slot_bytes} of states" if self.slot_bytes else ""
        return f"; the request takes {needed} bytes of the cache's {there}{states}"
