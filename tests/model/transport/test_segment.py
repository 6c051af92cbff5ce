from __future__ import annotations

import os
import stat

import pytest

from model.transport.handshake import HandshakeError
from model.transport.segment import check_segment, new_segment


def test_a_segment_is_its_owners_alone_and_cannot_change_its_size() -> None:
    segment = new_segment(8192)
    check_segment(segment, 8192)
    assert stat.S_IMODE(os.fstat(segment).st_mode) == 0o600
    with pytest.raises(PermissionError):
        os.ftruncate(segment, 4096)
    with pytest.raises(HandshakeError, match="another size"):
        check_segment(segment, 4096)
    os.close(segment)


def test_memory_that_could_shrink_is_refused() -> None:
    segment = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(segment, 4096)
    with pytest.raises(HandshakeError, match="could change it"):
        check_segment(segment, 4096)
    os.close(segment)
    reads, writes = os.pipe()
    with pytest.raises(HandshakeError):
        check_segment(reads, 4096)
    os.close(reads)
    os.close(writes)
