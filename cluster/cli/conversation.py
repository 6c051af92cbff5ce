"""Prints an answer while it comes, and measures it."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.console import Console

from cluster.cli.chat import AnswerTooLongError, ChatClient, Limits, Message, Piece

DEFAULT_MAX_TOKENS = 512        # an end for answers that would run to the end of the context


@dataclass(frozen=True, slots=True)
class Answered:
    """Measures an answer. Seconds are since the question was sent."""

    text: str
    num_tokens: int
    first_token_s: float
    total_s: float
    is_cut: bool = False        # max_tokens ended it

    @property
    def tokens_per_s(self) -> float | None:
        """Return the rate while tokens came; None for answers that are too short to have one."""
        if self.num_tokens < 2 or self.total_s <= self.first_token_s:
            return None
        return (self.num_tokens - 1) / (self.total_s - self.first_token_s)

    def summary(self) -> str:
        text = f"{self.num_tokens} {'token' if self.num_tokens == 1 else 'tokens'}"
        if self.num_tokens:
            text += f", the first after {self.first_token_s:.2f} s"
        if self.tokens_per_s is not None:
            text += f", then {self.tokens_per_s:.1f} tokens/s"
        return text + ("; cut there: --max-tokens allows more" if self.is_cut else "")


def print_answer(console: Console, client: ChatClient, messages: list[Message], limits: Limits) -> Answered:
    """Print the answer as it comes. Raises ChatError."""
    began_s, first_s, num_tokens, finish_reason, texts = time.perf_counter(), None, 0, "", []
    try:
        for piece in _pieces(client, messages, limits):
            if piece.text and first_s is None:
                first_s = time.perf_counter() - began_s
            texts.append(piece.text)
            console.print(printable(piece.text), end="", markup=False, highlight=False, soft_wrap=True)
            num_tokens = num_tokens if piece.num_tokens is None else piece.num_tokens
            finish_reason = piece.finish_reason or finish_reason
    finally:
        if texts:
            console.print()
    total_s = time.perf_counter() - began_s
    return Answered("".join(texts), num_tokens, total_s if first_s is None else first_s, total_s,
                    finish_reason == "length")


def _pieces(client: ChatClient, messages: list[Message], limits: Limits) -> Iterator[Piece]:
    """Stream an answer that ends after DEFAULT_MAX_TOKENS unless a limit is given, or sooner with the context."""
    if limits.max_tokens is not None:
        yield from client.answer(messages, limits)
        return
    try:
        yield from client.answer(messages, replace(limits, max_tokens=DEFAULT_MAX_TOKENS))
    except AnswerTooLongError:      # refused before its first piece
        yield from client.answer(messages, limits)


def printable(text: str) -> str:
    """Return the text without what would command the terminal (escape sequences and the like)."""
    return "".join("�" if unicodedata.category(char) == "Cc" and char not in "\n\t" else char
                   for char in text.replace("\r\n", "\n").replace("\x85", "\n"))


def sendable(text: str) -> str:
    """Return the text as UTF-8 can carry it: bytes that the terminal's encoding did not know are replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def converse(console: Console, notes: Console, client: ChatClient, limits: Limits) -> None:
    """Go on until the input ends or a line is empty. Ctrl-C ends the answer, not the conversation."""
    notes.print(f"Talking over {client.name}. Ctrl-C ends an answer; an empty line or Ctrl-D ends the conversation.",
                style="dim")
    messages: list[Message] = []
    while True:
        try:
            question = sendable(console.input("[bold]> [/bold]"))
        except (EOFError, KeyboardInterrupt):
            return
        if not question.strip():
            return
        messages.append(Message("user", question))
        try:
            answered = print_answer(console, client, messages, limits)
        except KeyboardInterrupt:
            messages.pop()
            notes.print("(stopped)", style="dim")
            continue
        messages.append(Message("assistant", answered.text))
        notes.print(answered.summary(), style="dim", markup=False, highlight=False, soft_wrap=True)
