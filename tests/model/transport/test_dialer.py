"""Members on different machines: network namespaces with a slow link between them, and a relay that delays."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from model.transport.address import EndpointAddress
from tests.deadlines import BEYOND_PATIENCE_S, PATIENCE_S
from tests.model.transport.members import Members, OtherProcess, as_json, exchange_sizes

DELAY_S = 0.005
HOSTS = ("10.211.0.1", "10.211.0.2")


class Relay:
    """Passes on what comes to its port, after a while, in both directions."""

    def __init__(self, target: EndpointAddress) -> None:
        self._target = (target.host, target.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                called = socket.create_connection(self._target)
                self._sockets += (caller, called)
                for source, sink in ((caller, called), (called, caller)):
                    waiting: queue.Queue[tuple[float, bytes]] = queue.Queue()
                    threading.Thread(target=self._read, args=(source, waiting), daemon=True).start()
                    threading.Thread(target=self._write, args=(sink, waiting), daemon=True).start()

    def _read(self, source: socket.socket, waiting: queue.Queue[tuple[float, bytes]]) -> None:
        part = b"first"
        while part:
            try:
                part = source.recv(1 << 16)
            except OSError:
                part = b""
            waiting.put((time.monotonic() + DELAY_S, part))

    def _write(self, sink: socket.socket, waiting: queue.Queue[tuple[float, bytes]]) -> None:
        never = threading.Event()
        while True:
            due_s, part = waiting.get()
            never.wait(max(due_s - time.monotonic(), 0.0))
            with contextlib.suppress(OSError):
                if not part:
                    sink.shutdown(socket.SHUT_RDWR)
                    return
                sink.sendall(part)


def test_a_delay_between_members_changes_nothing_but_time() -> None:
    members = Members(3, shares_memory=False)
    relays = [Relay(address) for address in members.addresses]
    members.addresses = [replace(address, port=relay.port)
                         for address, relay in zip(members.addresses, relays, strict=True)]
    for size in (0, 100, 3 << 20):
        groups = members.open()
        sizes_MM = np.full((3, 3), size)
        exchanged = [members.start(rank, lambda group=group, sizes_MM=sizes_MM: [  # type: ignore[misc]
            exchange_sizes(group, sizes_MM, seed) for seed in range(3)]) for rank, group in enumerate(groups)]
        for each in exchanged:
            each.result(PATIENCE_S)
        for group in groups:
            group.close()
    members.close()
    for relay in relays:
        relay.close()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Yield two network namespaces whose link carries 400 Mbit/s."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("needs root, ip and tc")
    names = (f"moesaic-a{os.getpid()}", f"moesaic-b{os.getpid()}")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", names[1])
        for index, (name, host) in enumerate(zip(names, HOSTS, strict=True)):
            ip("-n", name, "address", "add", f"{host}/24", "dev", f"v{index}")
            ip("-n", name, "link", "set", f"v{index}", "up")
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", f"v{index}", "root", "tbf", "rate", "400mbit",
                            "burst", "256kb", "latency", "100ms"], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        delete(names)
        pytest.skip(f"no network namespaces here: {error.stderr!r}")
    yield names
    delete(names)


def delete(names: tuple[str, str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.multinode
def test_machines_talk_over_tcp_at_any_size_and_hear_of_a_death(namespaces: tuple[str, str]) -> None:
    others = [OtherProcess(True, host, name) for host, name in zip(HOSTS, namespaces, strict=True)]
    try:
        assert not others[0].address.shares_memory_with(others[1].address)
        join(others, 1, BEYOND_PATIENCE_S)
        for size, times in ((100, 20), (3 << 20, 2)):
            for other in others:
                other.tell("exchange", 1, size, times)
            assert [other.answer() for other in others] == ["exchanged", "exchanged"]
        others[0].tell("exchange", 1, 100, 1)
        others[1].kill()
        assert others[0].answer() == ["CLOSED", 1]
    finally:
        for other in others:
            other.wait()


@pytest.mark.multinode
def test_a_cable_that_is_pulled_is_a_deadline_and_the_next_group_has_another_connection(
        namespaces: tuple[str, str]) -> None:
    others = [OtherProcess(True, host, name) for host, name in zip(HOSTS, namespaces, strict=True)]
    try:
        join(others, 1, 1.0)
        ip("-n", namespaces[0], "link", "set", "v0", "down")
        for other in others:
            other.tell("exchange", 1, 100, 1)
        assert [other.answer() for other in others] == [["DEADLINE", 1], ["DEADLINE", 0]]
        ip("-n", namespaces[0], "link", "set", "v0", "up")
        for other in others:
            other.tell("leave", 1)
        assert [other.answer() for other in others] == ["left", "left"]
        join(others, 2, BEYOND_PATIENCE_S)
        for other in others:
            other.tell("exchange", 2, 100, 3)
        assert [other.answer() for other in others] == ["exchanged", "exchanged"]
    finally:
        for other in others:
            other.wait()


def join(others: list[OtherProcess], group_id: int, timeout_s: float) -> None:
    addresses = [as_json(other.address) for other in others]
    for rank, other in enumerate(others):
        other.tell("join", group_id, addresses, rank, timeout_s)
    assert [other.answer() for other in others] == ["joined", "joined"]
