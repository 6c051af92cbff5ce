"""One choice of a client's request: a shard's token events in, the client's deltas out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from serving.engine.request import FinishReason, TokenEvent
from serving.router.generation import GenerationDelta
from serving.text.detokenizer import Piece


class TextStream(Protocol):
    """Turns tokens into text: the part of `serving.text.detokenizer.Detokenizer` that a choice needs."""

    def push(self, token_ids: Sequence[int]) -> Piece: ...
    def flush(self) -> str: ...


class Choice:
    """Tokens become text here, once and in order. After a delta with a finish_reason nothing more may be added."""

    def __init__(self, index: int, sequence_id: str, text: TextStream, stop_token_ids: Sequence[int],
                 includes_stop: bool) -> None:
        """`stop_token_ids`: the client's own, which are told as stop_reason; the model's end-of-sequence is not."""
        self.index = index
        self.sequence_id = sequence_id      # of its submission, in the journal and in shards
        self.num_tokens = 0                 # shown to the client
        self.num_given_up = 0               # times that a shard has given it up
        self.num_moves = 0                  # from members that left
        self.is_ended = False
        self._text = text
        self._stop_token_ids = frozenset(stop_token_ids)
        self._includes_stop = includes_stop

    def add(self, event: TokenEvent) -> GenerationDelta:
        """Return what one event tells the client. A stop string cuts tokens and scores where it is complete."""
        is_stop_hidden = event.stop_token_id is not None and event.token_ids and not self._includes_stop
        shown_ids = event.token_ids[:-1] if is_stop_hidden else event.token_ids
        piece = self._text.push(shown_ids)
        text, num_kept, finish_reason = piece.text, len(event.token_ids), event.finish_reason
        if piece.stop_string is not None:
            num_kept, finish_reason = piece.num_tokens_kept, FinishReason.STOP
        elif finish_reason is not None:
            text += self._text.flush()
        is_first, self.num_tokens = self.num_tokens == 0, self.num_tokens + num_kept
        return GenerationDelta(
            choice=self.index, text=text, token_ids=event.token_ids[:num_kept], logprobs=event.logprobs[:num_kept],
            prompt_logprobs=event.prompt_logprobs, num_cached_tokens=event.num_cached_tokens if is_first else None,
            finish_reason=finish_reason, stop_reason=piece.stop_string or self._told_stop_token(event))

    def _told_stop_token(self, event: TokenEvent) -> int | None:
        return event.stop_token_id if event.stop_token_id in self._stop_token_ids else None
