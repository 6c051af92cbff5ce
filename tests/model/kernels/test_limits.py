from __future__ import annotations

import re
from pathlib import Path

import pytest

from model.kernels import limits
from model.kernels.limits import above_limit, fits_block
from serving.config import SchedulerConfig

KERNELS = Path(limits.__file__).parent


@pytest.mark.parametrize(("header", "name", "limit"), [
    ("packed_attention.h", "MAX_HEAD_DIM", limits.MAX_HEAD_DIM),
    ("packed_delta_net.h", "MAX_KEY_DIM", limits.MAX_KEY_HEAD_DIM),
    ("packed_delta_net.h", "MAX_CONV_KERNEL", limits.MAX_CONV_KERNEL)])
def test_the_table_is_what_c_has_room_for(header: str, name: str, limit: int) -> None:
    found = re.search(rf"\b{name} = (\d+)", (KERNELS / header).read_text())
    assert found is not None and int(found[1]) == limit


def test_the_first_shape_that_is_too_large_is_named() -> None:
    assert above_limit(256, 32_767, 256, 16) is None and above_limit(64, 8) is None
    assert above_limit(264, 8) == ("head_dim", 264, 256)
    assert above_limit(64, 32_768) == ("num_experts", 32_768, 32_767)
    assert above_limit(64, 8, key_head_dim=257, conv_kernel_size=99) == ("linear_key_head_dim", 257, 256)
    assert above_limit(64, 8, 128, 17) == ("linear_conv_kernel_dim", 17, 16)


def test_blocks_of_every_size_that_a_config_may_ask_for_fit() -> None:
    for block_size in (16, 32, 64):
        assert SchedulerConfig(block_size=block_size).block_size == block_size and fits_block(block_size)
    assert fits_block(4) and not any(map(fits_block, (0, 3, 12, 17, -16)))
