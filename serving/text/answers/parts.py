"""What an answer is made of, as small pieces in their order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins: its number in the answer, from 0, and the function's name."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next piece of the arguments, as JSON text, of the call that began last."""

    index: int
    text: str


Part = Content | Reasoning | CallStart | Arguments
