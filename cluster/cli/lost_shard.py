"""A scene of the demo: the process of the shard that computes an answer is killed, and the answer goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import psutil
from rich.console import Console

from cluster.cli.chat import ChatClient, Limits, Message, Piece
from cluster.cli.conversation import print_answer
from cluster.coordinator.view import ClusterStatus
from serving.errors import ServingError
from serving.link.epoch import Member

_LOOK_S = 0.1           # between two looks at who computes; shards tell it every second


class LostShardError(ServingError):
    """The shard cannot be killed from here."""


def show_a_loss(console: Console, chat: ChatClient, question: str, max_tokens: int,
                status: Callable[[], ClusterStatus]) -> None:
    """Ask, kill who answers, and say who went on; then ask again, to show that it is the same text. For greedy answers
    of a service on this machine that nobody else asks. Raises ChatError, LostShardError."""
    console.print(question, style="bold")
    messages, limits = [Message("user", question)], Limits(max_tokens, 0.0)
    interrupted = InterruptedChat(chat, status, kill_shard)
    print_answer(console, interrupted, messages, limits)
    console.print(interrupted.story(), markup=False, highlight=False, soft_wrap=True)
    if interrupted.victim is not None:
        again = "".join(piece.text for piece in chat.answer(messages, limits))
        same = "the same text" if interrupted.text == again else f"ANOTHER TEXT: {again}"
        console.print(f"Asked once more, with nobody killed: {same}.", markup=False, highlight=False, soft_wrap=True)


class InterruptedChat:
    """Is a ChatClient that kills the shard which computes the answer, once it is known, and marks where that was."""

    def __init__(self, chat: ChatClient, status: Callable[[], ClusterStatus], kill: Callable[[Member], None]) -> None:
        self.name = chat.name
        self.victim: Member | None = None
        self.successor: Member | None = None
        self.pause_s: float | None = None       # between the pieces of text around the kill
        self.text = ""                          # without the mark
        self._chat = chat
        self._status = status
        self._kill = kill
        self._looked_s = 0.0

    def answer(self, messages: list[Message], limits: Limits) -> Iterator[Piece]:
        killed_s = 0.0
        for piece in self._chat.answer(messages, limits):
            if self.victim is not None and self.pause_s is None:
                self.pause_s = time.monotonic() - killed_s
            self.text += piece.text
            yield piece
            if not piece.text or self.successor is not None:
                continue
            computes = self._who_computes()
            if computes is None:
                continue
            if self.victim is None:
                self._kill(computes)
                self.victim, killed_s = computes, time.monotonic()
                yield Piece(f" [{computes.node_name} is killed] ")
            else:
                self.successor = computes

    def story(self) -> str:
        """Return what happened, in a sentence."""
        if self.victim is None:
            return "The answer ended before it was known which node computes it; nobody was killed."
        went_on = self.successor.node_name if self.successor else "another node"
        pause = f" {self.pause_s:.2f} s later" if self.pause_s is not None else ""
        return f"{self.victim.node_name} computed it until its process was killed; {went_on} went on{pause}."

    def _who_computes(self) -> Member | None:
        """Look now and then which shard has a sequence, other than the one that was killed."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_S:
            return None
        self._looked_s = now_s
        shards = self._status().shards
        return next((member for member, state in shards if state.num_running and not _is(member, self.victim)), None)


def _is(member: Member, other: Member | None) -> bool:
    return other is not None and member.shard_id == other.shard_id


def kill_shard(member: Member) -> None:
    """Kill the process that listens at the member's link, as `kill -9` does. Raises LostShardError."""
    port = int(member.link_address.rpartition(":")[2])
    pids = {connection.pid for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            and connection.pid}
    if len(pids) != 1:
        raise LostShardError(f"the shard of {member.node_name} at {member.link_address} is no process of this machine",
                             fix="run the scene where the local nodes are")
    os.kill(pids.pop(), signal.SIGKILL)
