"""Members hear each other, and nobody else, also while one holds Python's lock."""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from cluster.shard.heartbeats import INTERVAL_S, Heartbeats
from model.transport.address import EndpointAddress, Secret
from model.transport.library import load_library
from tests.deadlines import PATIENCE_S
from tests.model.transport.members import ROOT, as_json

LIMIT_S = 0.5


def address() -> EndpointAddress:
    return EndpointAddress(secrets.token_hex(16), "127.0.0.1", 1, "", Secret(secrets.token_hex(32)))


def eventually(happens: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < until_s
        time.sleep(0.01)


@pytest.fixture
def one() -> Iterator[Heartbeats]:
    beats = Heartbeats(address(), LIMIT_S)
    yield beats
    beats.close()


class OtherProcess:
    def __init__(self) -> None:
        self.address = address()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.shard.heartbeat_process", json.dumps(as_json(self.address))],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def end(self) -> None:
        self.send(signal.SIGCONT)
        self._process.communicate(b"x", timeout=PATIENCE_S)


@pytest.fixture
def other() -> Iterator[OtherProcess]:
    process = OtherProcess()
    yield process
    process.end()


class Relay:
    """Passes datagrams on between a process that asks and one that answers, or does something else with them."""

    def __init__(self, port: int) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(PATIENCE_S)
        self.port = int(self._socket.getsockname()[1])
        self._answering = ("127.0.0.1", port)
        self._asking: tuple[str, int] | None = None

    def answer(self) -> bytes:
        """Return the answer to the next question; who asked gets none."""
        while True:
            datagram, sender = self._socket.recvfrom(1000)
            if sender == self._answering:
                return datagram
            self._asking = sender
            self._socket.sendto(datagram, self._answering)

    def give(self, answer: bytes) -> None:
        assert self._asking is not None
        self._socket.sendto(answer, self._asking)

    def close(self) -> None:
        self._socket.close()


def test_who_holds_pythons_lock_answers_all_the_time_and_who_is_stopped_does_not(one: Heartbeats,
                                                                                 other: OtherProcess) -> None:
    between = Relay(other.port)
    one.watch([(other.address, between.port)])
    for _ in range(round(3 * LIMIT_S / INTERVAL_S)):        # it holds the lock all the time
        between.give(between.answer())
    between.close()
    one.watch([(other.address, other.port)])
    other.send(signal.SIGSTOP)
    assert select.select([one.news], [], [], PATIENCE_S)[0]
    eventually(lambda: one.silent() == (other.address.peer_id,))    # an end of a silence is news too
    assert one.silence_s(other.address.peer_id) > LIMIT_S
    other.send(signal.SIGCONT)
    eventually(lambda: one.silent() == ())


def test_who_ends_is_silent_and_whom_nobody_watches_is_not(one: Heartbeats) -> None:
    own = address()
    answering = Heartbeats(own, LIMIT_S)
    one.watch([(own, answering.port)])
    answering.close()
    eventually(lambda: one.silent() == (own.peer_id,))
    one.watch([])
    assert one.silent() == () and one.silence_s(own.peer_id) == 0
    answering.close()


def test_who_was_stopped_itself_accuses_nobody_at_once() -> None:
    """Its silence is counted in time in which it listened."""
    watching = subprocess.run([sys.executable, "-c", _STOPPED], cwd=ROOT, stdout=subprocess.PIPE, timeout=PATIENCE_S,
                              check=True)
    assert float(watching.stdout) > 1.0


# The clock goes on for 1.5 s while its threads stand still -> the seconds that do not count. What it watches does not
# exist.
_STOPPED = """
import os, signal, subprocess, time
from tests.cluster.shard.test_heartbeats import address
from cluster.shard.heartbeats import Heartbeats

beats, peer = Heartbeats(address(), 60.0), address()
beats.watch([(peer, 9)])
until_stopped = f"until grep -q 'State:.T' /proc/{os.getpid()}/status; do sleep 0.05; done"
subprocess.Popen(["sh", "-c", f"{until_stopped}; sleep 1.5; kill -CONT {os.getpid()}"])
before_s, silence_s = time.monotonic(), beats.silence_s(peer.peer_id)
os.kill(os.getpid(), signal.SIGSTOP)
print(time.monotonic() - before_s - (beats.silence_s(peer.peer_id) - silence_s))
beats.close()
"""


@pytest.fixture
def relay(one: Heartbeats) -> Iterator[tuple[Relay, EndpointAddress]]:
    """Between `one` and a process with that address."""
    own = address()
    answering = Heartbeats(own, LIMIT_S)
    relay = Relay(answering.port)
    one.watch([(own, relay.port)])
    yield relay, own
    answering.close()
    relay.close()


@pytest.mark.parametrize("spoil", [lambda answer: b"", lambda answer: answer + b"x",
                                   lambda answer: answer[:-1] + bytes([answer[-1] ^ 1]),
                                   lambda answer: answer[:40] + bytes([1]) + answer[41:]])
def test_answers_that_were_changed_say_nothing(one: Heartbeats, relay: tuple[Relay, EndpointAddress],
                                               spoil: Callable[[bytes], bytes]) -> None:
    between, _ = relay
    while not one.silent():
        between.give(spoil(between.answer()))
    while one.silent():
        between.give(between.answer())


def test_answers_that_come_again_say_nothing(one: Heartbeats, relay: tuple[Relay, EndpointAddress]) -> None:
    between, _ = relay
    older, newer = between.answer(), between.answer()
    between.give(newer)
    while not one.silent():
        for answer in (older, newer):
            between.give(answer)
        between.answer()


def test_strangers_at_the_port_are_not_heard(one: Heartbeats) -> None:
    own = address()
    stranger = Heartbeats(replace(own, token=Secret("another")), LIMIT_S)
    another = Heartbeats(address(), LIMIT_S)
    one.watch([(own, stranger.port), (address(), another.port)])
    eventually(lambda: len(one.silent()) == 2)
    stranger.close()
    another.close()


def test_signatures_are_those_of_the_paper() -> None:
    """SipHash-2-4 of 15 bytes, its appendix A; of none, its authors' list of vectors."""
    siphash, key = load_library().siphash, bytes(range(16))
    assert siphash(key, bytes(range(15)), 15) == 0xa129ca6149be45e5
    assert siphash(key, b"", 0) == 0x726fdb47dd0e0e31
