"""The demo's scene of a loss: who computes an answer is killed, and what is told of it is what happened."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from cluster.cli.chat import Limits, Message, Piece
from cluster.cli.lost_shard import LostShardError, kill_shard, show_a_loss
from cluster.coordinator.view import ClusterStatus, GroupPhase, View
from cluster.device.node import free_port
from serving.link.epoch import DeviceFacts, Member, ShardStatus

FACTS = DeviceFacts("cpu", "cpu", "packed-cpu", 1 << 30, 1)
A, B = (Member(f"cpu-{name}", "cpu", name, f"node-{name}", "127.0.0.1:1", FACTS) for name in "ab")
LISTEN = "import socket, time; s = socket.create_server(('127.0.0.1', {port})); print(flush=True); time.sleep(600)"


class Told:
    """A chat that says the same twice, and a status in which another node computes with every word."""

    name = "gRPC"

    def __init__(self, texts: list[str], computing: list[Member | None]) -> None:
        self.texts = texts
        self.computing = computing
        self.num_words = 0

    def answer(self, messages: list[Message], limits: Limits) -> Iterator[Piece]:
        for word in self.texts.pop(0).split():
            self.num_words += 1
            yield Piece(f"{word} ")
        yield Piece(num_tokens=3, finish_reason="length")

    def status(self) -> ClusterStatus:
        computes = self.computing[min(self.num_words, len(self.computing)) - 1]
        shards = tuple((member, ShardStatus(member.shard_id, 1, "ready", num_running=int(member is computes)))
                       for member in (A, B))
        return ClusterStatus(View(GroupPhase.READY, None), shards, ())


def shown(chat: Told, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[Member]]:
    killed: list[Member] = []
    monkeypatch.setattr("cluster.cli.lost_shard.kill_shard", killed.append)
    monkeypatch.setattr("cluster.cli.lost_shard._LOOK_S", 0.0)
    console = Console(file=io.StringIO(), width=200)
    show_a_loss(console, chat, "Why?", 3, chat.status)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), killed


def test_who_computes_is_killed_and_who_goes_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    text, killed = shown(Told(["one two three"] * 2, [None, B, A]), monkeypatch)
    assert killed == [B] and "one two  [node-b is killed] three" in text
    assert "node-b computed it until its process was killed; node-a went on 0.00 s later." in text
    assert "with nobody killed: the same text." in text


def test_another_text_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    text, _ = shown(Told(["one two three", "one two four"], [A, B, B]), monkeypatch)
    assert "ANOTHER TEXT: one two four" in text


def test_an_answer_that_ends_too_soon_kills_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    text, killed = shown(Told(["one two three"], [None, None, None]), monkeypatch)
    assert not killed and "nobody was killed" in text and "once more" not in text


def test_the_process_at_the_link_is_killed() -> None:
    port = free_port()
    member = replace(A, link_address=f"127.0.0.1:{port}")
    with pytest.raises(LostShardError, match="node-a at 127.0.0.1"):
        kill_shard(member)
    with subprocess.Popen([sys.executable, "-c", LISTEN.format(port=port)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        kill_shard(member)
        assert process.wait() == -signal.SIGKILL
