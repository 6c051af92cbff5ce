"""Strangers at the door: nobody gets in, nobody inside notices."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.errors import GroupError
from model.transport.address import EndpointAddress, Secret
from model.transport.dialer import dial
from model.transport.endpoint import Endpoint
from model.transport.handshake import CHALLENGE_BYTES, HELLO_BYTES, write_hello
from tests.deadlines import BEYOND_PATIENCE_S, PATIENCE_S
from tests.model.transport.members import Members, exchange_sizes


@pytest.fixture(scope="module", params=[True, False], ids=["memory", "tcp"])
def members(request: pytest.FixtureRequest) -> Iterator[Members]:
    members = Members(2, request.param)
    yield members
    members.close()


def call(address: EndpointAddress) -> socket.socket:
    if not address.machine:
        return socket.create_connection((address.host, address.port), PATIENCE_S)
    caller = socket.socket(socket.AF_UNIX)
    caller.settimeout(PATIENCE_S)
    caller.connect(address.socket_name)
    return caller


def reads_to_the_end(caller: socket.socket) -> bool:
    """Return whether the other side hangs up."""
    try:
        while caller.recv(1000):
            pass
    except ConnectionResetError:
        pass
    return True


def members_still_talk(members: Members) -> None:
    groups = members.open()
    members.run(lambda rank: exchange_sizes(groups[rank], np.full((2, 2), 1000), 1))
    for group in groups:
        group.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(min_size=1, max_size=300), is_well_begun=st.booleans())
def test_garbage_is_hung_up_on(members: Members, garbage: bytes, is_well_begun: bool) -> None:
    address = members.addresses[1]
    begin = write_hello(b"x" * 16, bytes.fromhex(address.peer_id)) if is_well_begun else b""
    with call(address) as caller:
        try:
            caller.sendall(begin + garbage + bytes(HELLO_BYTES))
            assert reads_to_the_end(caller)
        except BrokenPipeError:
            pass


def test_members_go_on_beside_strangers_that_send_half_a_word(members: Members) -> None:
    groups = members.open()
    strangers = [call(members.addresses[0]) for _ in range(100)]        # more than the doorman listens to at once
    for stranger in strangers:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            stranger.sendall(b"MOESAIC")
    members.run(lambda rank: exchange_sizes(groups[rank], np.full((2, 2), 1000), 1))
    for group in groups:
        group.close()
    members_still_talk(members)
    late = Endpoint("127.0.0.1", machine=members.addresses[0].machine)      # and a newcomer gets in
    both = [members.addresses[0], late.address]
    group_id = 1_000
    future = members.start(0, lambda: members.endpoints[0].open_group(group_id, both, 0, BEYOND_PATIENCE_S))
    late.open_group(group_id, both, 1, BEYOND_PATIENCE_S).close()
    future.result(PATIENCE_S).close()
    members._last_group_id = group_id
    late.close()
    for stranger in strangers:
        stranger.close()


def test_a_wrong_token_does_not_get_in(members: Members) -> None:
    stranger = Endpoint("127.0.0.1", machine=members.addresses[0].machine)
    deceived = [replace(address, token=Secret("0" * 64)) for address in members.addresses]
    # It dials whom it is below; the token is wrong for both.
    target = max(members.addresses, key=lambda address: address.peer_id)
    wrong = next(address for address in deceived if address.peer_id == target.peer_id)
    stranger.address = replace(stranger.address, peer_id="0" * 32)
    with pytest.raises(GroupError, match="it does not know the token"):
        stranger.open_group(1, [stranger.address, wrong], 0, 0.3)
    stranger.close()
    members_still_talk(members)


def test_an_acceptor_that_does_not_know_the_token_gets_no_proof(members: Members) -> None:
    """The dialer hangs up before it proves anything: who took the port learns nothing to use elsewhere."""
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        address = replace(members.addresses[0], port=impostor.getsockname()[1], peer_id="f" * 32, machine="")
        both = [members.addresses[0], address]
        future = members.start(0, lambda: pytest.raises(
            GroupError, members.endpoints[0].open_group, members.next_group_id(), both, 0, 0.3))
        connected, _ = impostor.accept()
        with connected:
            connected.recv(HELLO_BYTES)
            connected.sendall(bytes(CHALLENGE_BYTES))
            assert connected.recv(1000) == b""
    future.result(PATIENCE_S)


def test_a_caller_for_another_process_is_refused(members: Members) -> None:
    with call(members.addresses[0]) as caller:
        caller.sendall(write_hello(b"x" * 16, os.urandom(16)))
        assert reads_to_the_end(caller)


def test_a_peer_that_sends_garbage_after_the_handshake_is_only_its_own_loss() -> None:
    """Its connection ends; others of the same endpoint go on."""
    members = Members(3, shares_memory=False)
    for group in members.open():
        group.close()
    own, target = members.addresses[0], members.endpoints[2]
    pair = dial(replace(own, peer_id="0" * 32), target.address, -1, 0, 1e12)
    os.write(pair.socket, b"garbage" * 1000)
    groups = members.open()
    members.run(lambda rank: exchange_sizes(groups[rank], np.full((3, 3), 1000), 1))
    os.close(pair.socket)
    members.close()
