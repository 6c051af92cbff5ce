"""How many prompt tokens a step may compute so that sequences that decode beside them keep their SLO. Pure.

Each member bounds its own, by what steps took that it was part of and what the others told before the last one.
"""

from __future__ import annotations

from model.step import StepHeader
from serving.engine.agreement import Agreement
from serving.engine.transfer_choice import PrefillRate

SLO_PART = 0.9          # of the SLO, that a step is filled for
_LEAST_PART = 1 / 16    # of a step's token budget: prompts always get on, however slow the steps are
_GROWTH = 2.0           # times what lately was measured: nobody knows whether more takes as long a token
_FORGET = 0.9           # of what lately was measured is left after a step that computed less
_MOST_SLOWER = 4.0      # a step counts as so many times slower than those before at most
_NEWEST_PART = 1 / 8    # of the mean length of steps without prompts, that the newest makes


class PrefillBudget:
    """Measures the steps of a group, and bounds the prompt tokens of the next one while anybody decodes."""

    def __init__(self, itl_slo_s: float) -> None:
        self._itl_slo_s = itl_slo_s
        self._decode_s: float | None = None     # of a step without prompts; None: none was seen
        self._rate = PrefillRate()              # of the group, by what prompts add to a step
        self._num_measured = 0.0                # prompt tokens of a step that the rate is sure to hold for
        self._others_decode = False
        self._num_others = 0                    # other members with prompts in the last step

    def hear(self, agreement: Agreement, own: StepHeader) -> None:
        """Note what the members compute in the step that they have agreed on, if in any."""
        self._others_decode = sum(map(_num_decoding, agreement.headers)) > _num_decoding(own)
        num_with_prompts = sum(header.num_prompt_tokens > 0 for header in agreement.headers)
        self._num_others = num_with_prompts - (own.num_prompt_tokens > 0)

    def measure(self, agreement: Agreement, step_s: float) -> None:
        """Count a step that was made."""
        num_prompt_tokens = sum(header.num_prompt_tokens for header in agreement.headers)
        if not num_prompt_tokens:
            before_s = step_s if self._decode_s is None else self._decode_s
            self._decode_s = before_s + _NEWEST_PART * (step_s - before_s)
            return
        if self._decode_s is not None:      # what is done beside prompts takes no longer without them
            self._decode_s = min(self._decode_s, step_s)
        self._rate.add(num_prompt_tokens, self._believed_s(num_prompt_tokens, step_s - (self._decode_s or 0.0)))
        self._num_measured = max(num_prompt_tokens, _FORGET * self._num_measured)

    def of_step(self, token_budget: int, num_decoding: int) -> int:
        """Return the prompt tokens that this member may compute in its next step, in which it decodes so many."""
        left = token_budget - num_decoding
        if not num_decoding and not self._others_decode:
            return left
        least = max(2, int(_LEAST_PART * token_budget))
        return min(left, max(least, int(self._of_group() / (1 + self._num_others))))

    def _believed_s(self, num_prompt_tokens: int, took_s: float) -> float:
        """Return what counts of a time: where it is far beyond what was measured before, something else took it."""
        rate = self._rate.tokens_per_s
        return took_s if rate is None else min(took_s, _MOST_SLOWER * num_prompt_tokens / rate)

    def _of_group(self) -> float:
        """Return the prompt tokens of all members that fit in a step within the SLO."""
        room_s = max(0.0, SLO_PART * self._itl_slo_s - (self._decode_s or 0.0))
        rate, most = self._rate.tokens_per_s, _GROWTH * self._num_measured
        return most if rate is None and room_s else min(room_s * (rate or 0.0), most)


def _num_decoding(header: StepHeader) -> int:
    return header.num_tokens - header.num_prompt_tokens
