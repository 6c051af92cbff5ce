"""Prints an answer while it comes, and measures it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console

from cluster.cli.chat import ChatClient, Message


@dataclass(frozen=True, slots=True)
class Answered:
    """Seconds are since the question was sent."""

    text: str
    num_tokens: int
    first_token_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """While tokens came."""
        return (self.num_tokens - 1) / max(self.total_s - self.first_token_s, 1e-9)

    def summary(self) -> str:
        return (f"{self.num_tokens} tokens, the first after {self.first_token_s:.2f} s, "
                f"then {self.tokens_per_s:.1f} tokens/s")


def print_answer(console: Console, client: ChatClient, messages: list[Message], max_tokens: int | None,
                 temperature: float | None) -> Answered:
    """Raises ChatError."""
    began_s, first_s, num_tokens, texts = time.perf_counter(), None, 0, []
    try:
        for piece in client.answer(messages, max_tokens, temperature):
            if piece.text and first_s is None:
                first_s = time.perf_counter() - began_s
            texts.append(piece.text)
            console.print(piece.text, end="", markup=False, highlight=False, soft_wrap=True)
            num_tokens = num_tokens if piece.num_tokens is None else piece.num_tokens
    finally:
        console.print()
    total_s = time.perf_counter() - began_s
    return Answered("".join(texts), num_tokens, total_s if first_s is None else first_s, total_s)


def converse(console: Console, client: ChatClient, max_tokens: int | None, temperature: float | None) -> None:
    """A conversation until end of input or an empty line. Ctrl-C ends the answer, not the conversation."""
    console.print(f"Talking over {client.name}. An empty line or Ctrl-D ends it.", style="dim")
    messages: list[Message] = []
    while True:
        try:
            question = console.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            return
        if not question.strip():
            return
        messages.append(Message("user", question))
        try:
            answered = print_answer(console, client, messages, max_tokens, temperature)
        except KeyboardInterrupt:
            messages.pop()
            console.print("(stopped)", style="dim")
            continue
        messages.append(Message("assistant", answered.text))
        console.print(answered.summary(), style="dim")
