"""Log-probabilities in the shapes that the chat and the completions API give them."""

from __future__ import annotations

from collections.abc import Sequence

from model.step import TokenLogprob
from serving.ingress.openai.answers import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from serving.text.detokenizer import Detokenizer
from serving.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0     # the OpenAI API's "very unlikely"; JSON knows no -inf


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
    def entry(token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(token=tokenizer.token_text(token_id), logprob=max(logprob, LEAST_LOGPROB),
                          bytes=list(tokenizer.token_bytes(token_id)))

    content = []
    for scored in logprobs:
        chosen = entry(scored.token_id, scored.logprob)
        content.append(ChatTokenLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes,
                                        top_logprobs=[entry(token_id, logprob) for token_id, logprob in scored.top]))
    return ChatLogprobs(content=content)


class CompletionLogprobsWriter:
    """Counts where in one choice's text (an echoed prompt included) each token begins."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids, skip_special_tokens=skip_special_tokens)
        self._text_offset = 0

    def skip(self, text: str) -> None:
        """Note that `text` goes ahead of the tokens."""
        self._text_offset += len(text)

    def prompt(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """Write an echoed prompt: its first token has no log-probability, `logprobs` are of the others."""
        self._text_offset += len(self._detokenizer.push(token_ids[:1]).text)
        rest = self.output(logprobs)
        return CompletionLogprobs(
            tokens=[self._tokenizer.token_text(token_ids[0]), *rest.tokens],
            token_logprobs=[None, *rest.token_logprobs], top_logprobs=[None, *rest.top_logprobs],
            text_offset=[0, *rest.text_offset])

    def output(self, logprobs: Sequence[TokenLogprob]) -> CompletionLogprobs:
        offsets = []
        for scored in logprobs:
            offsets.append(self._text_offset)
            self._text_offset += len(self._detokenizer.push([scored.token_id]).text)
        return CompletionLogprobs(
            tokens=[self._tokenizer.token_text(scored.token_id) for scored in logprobs],
            token_logprobs=[max(scored.logprob, LEAST_LOGPROB) for scored in logprobs],
            top_logprobs=[self._top(scored) for scored in logprobs], text_offset=offsets)

    def _top(self, scored: TokenLogprob) -> dict[str, float]:
        """Return them by text, with the chosen token. Among tokens of one text the most likely counts."""
        top: dict[str, float] = {}
        for token_id, logprob in (*scored.top, (scored.token_id, scored.logprob)):
            top.setdefault(self._tokenizer.token_text(token_id), max(logprob, LEAST_LOGPROB))
        return top


def prompt_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> PromptLogprobs:
    """Return vLLM's shape: for each prompt token a map from token id; the first token's is None."""
    def entries(scored: TokenLogprob) -> dict[int, PromptLogprob]:
        ranked = {token_id: PromptLogprob(logprob=max(logprob, LEAST_LOGPROB), rank=rank,
                                          decoded_token=tokenizer.token_text(token_id))
                  for rank, (token_id, logprob) in enumerate(scored.top, start=1)}
        chosen = PromptLogprob(logprob=max(scored.logprob, LEAST_LOGPROB), rank=None,
                               decoded_token=tokenizer.token_text(scored.token_id))
        return {scored.token_id: chosen} | ranked

    return [None, *(entries(scored) for scored in logprobs)]
