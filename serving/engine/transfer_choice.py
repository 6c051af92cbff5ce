"""Whether KV blocks are sent to another member or computed there again: what is done first by measured rates. Pure."""

from __future__ import annotations

from dataclasses import dataclass

HALF_LIFE_TOKENS = 4096     # of prefill, after which what was measured counts half


@dataclass(frozen=True, slots=True)
class Transfer:
    """What the rest of a sequence's prefix takes, either way. A rate that nothing has measured yet is None."""

    num_bytes: int              # to send
    num_bytes_before: int       # that the receiver takes first, for others
    num_tokens: int             # to compute instead
    num_tokens_before: int      # of other sequences, which the receiver computes first in any case
    num_sending: int            # receivers that share the sender, this one included
    bytes_per_s: float | None
    tokens_per_s: float | None

    @property
    def sending_s(self) -> float | None:
        if self.bytes_per_s is None:
            return None
        return (self.num_bytes_before + self.num_bytes) * self.num_sending / self.bytes_per_s

    @property
    def computing_s(self) -> float | None:
        """Return when it would be computed. Blocks come while others' tokens are computed, which both ways wait for."""
        return None if self.tokens_per_s is None else (self.num_tokens_before + self.num_tokens) / self.tokens_per_s


def is_sent(transfer: Transfer) -> bool:
    """Return whether to send. What is not known is measured by sending: it holds up no step."""
    if not transfer.num_tokens:
        return False
    sending_s, computing_s = transfer.sending_s, transfer.computing_s
    return sending_s is None or computing_s is None or sending_s < computing_s


class PrefillRate:
    """Measures the tokens a second at which prompts are computed, from whole steps: by least squares, so that a step
    with a few tokens, whose length others make, says little."""

    def __init__(self) -> None:
        self._tokens_squared = 0.0
        self._tokens_times_s = 0.0

    def add(self, num_tokens: int, step_s: float) -> None:
        """Note a step that has computed so many tokens of prompts."""
        kept = 0.5 ** (num_tokens / HALF_LIFE_TOKENS)
        self._tokens_squared = kept * self._tokens_squared + num_tokens * num_tokens
        self._tokens_times_s = kept * self._tokens_times_s + num_tokens * step_s

    @property
    def tokens_per_s(self) -> float | None:
        """None: nothing was measured."""
        return self._tokens_squared / self._tokens_times_s if self._tokens_times_s > 0 else None
