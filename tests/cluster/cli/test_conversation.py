"""Answers end, are measured, and cannot command the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from cluster.cli.chat import AnswerTooLongError, Limits, Message, Piece
from cluster.cli.conversation import DEFAULT_MAX_TOKENS, Answered, converse, print_answer, printable, sendable


class Client:
    """Answers with what it was asked for; its context holds `context` tokens; Ctrl-C comes when the text says so."""

    name = "test"

    def __init__(self, context: int = 10_000) -> None:
        self.context = context
        self.asked: list[tuple[list[str], Limits]] = []

    def answer(self, messages: list[Message], limits: Limits) -> Iterator[Piece]:
        self.asked.append(([message.content for message in messages], limits))
        if (limits.max_tokens or 0) > self.context:
            raise AnswerTooLongError("too long")
        yield Piece("to ")
        if messages[-1].content == "stop":
            raise KeyboardInterrupt
        yield Piece(messages[-1].content)
        yield Piece(num_tokens=2, finish_reason="stop")


def console() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=60), file


@pytest.mark.parametrize(("context", "given", "asked"), [
    (10_000, None, [DEFAULT_MAX_TOKENS]), (10_000, 7, [7]), (100, None, [DEFAULT_MAX_TOKENS, None])])
def test_answers_end_by_themselves(context: int, given: int | None, asked: list[int | None]) -> None:
    client = Client(context)
    answered = print_answer(console()[0], client, [Message("user", "you")], Limits(given))
    assert [limits.max_tokens for _, limits in client.asked] == asked
    assert answered.text == "to you" and answered.num_tokens == 2 and not answered.is_cut


def test_a_limit_that_was_given_is_not_changed() -> None:
    with pytest.raises(AnswerTooLongError):
        print_answer(console()[0], Client(100), [Message("user", "you")], Limits(200))


def test_the_rate_is_shown_where_there_is_one() -> None:
    assert Answered("a", 11, 0.5, 1.5).summary() == "11 tokens, the first after 0.50 s, then 10.0 tokens/s"
    assert Answered("a", 1, 0.5, 0.5).summary() == "1 token, the first after 0.50 s"
    assert Answered("", 0, 0.5, 0.5).summary() == "0 tokens"
    assert "--max-tokens" in Answered("a", 512, 0.5, 1.5, is_cut=True).summary()


def test_ctrl_c_ends_the_answer_and_the_conversation_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("you\nstop\nme\n\nnever\n"))
    client, (screen, shown), (notes, said) = Client(), console(), console()
    converse(screen, notes, client, Limits())
    assert [messages for messages, _ in client.asked] == [["you"], ["you", "to you", "stop"], ["you", "to you", "me"]]
    assert "to you" in shown.getvalue() and "(stopped)" in said.getvalue() and "2 tokens" in said.getvalue()


def test_an_answer_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07c\x9bd\x00\n\te\r\nf\u0085g") == "a�[31mb�c�d�\n\te\nf\ng"
    assert printable("é 日本 \u2028 👍🏽") == "é 日本 \u2028 👍🏽"


def test_what_the_terminal_could_not_decode_is_replaced() -> None:
    assert sendable("schön 日本") == "schön 日本"
    assert sendable(b"sch\xf6n".decode("utf-8", "surrogateescape")) == "sch�n"
