"""Where a torch group meets. Groups themselves: test_process_group.py."""

from __future__ import annotations

import pytest

from cluster.shard.torch_group import TorchGroup, _local_address
from model.errors import GroupError


@pytest.mark.parametrize("rendezvous", ["localhost:29500", "tcp://localhost", "file:///x"])
def test_an_address_that_is_none_is_refused(rendezvous: str) -> None:
    with pytest.raises(GroupError, match="give it as tcp://host:port"):
        TorchGroup.join(rendezvous, 0, 2, 1.0, False, "cpu")


def test_gloo_binds_to_the_interface_that_reaches_the_rendezvous() -> None:
    assert _local_address("127.0.0.1", 29500) == "127.0.0.1"
    assert _local_address("::1", 29500) == "::1"
