"""A device profile for tests."""

from __future__ import annotations

from serving.link.epoch import DeviceProfile

PROFILE = DeviceProfile(
    source="measured", read_bytes_per_s=20e9, gemm_flop_per_s=((1, 20e9), (64, 150e9), (256, 200e9)),
    expert_s=((1, 4e-5), (64, 3e-4), (256, 0.0008)), dense_s=((1, 1e-4), (256, 2e-3)),
    head_s=((1, 1e-3), (256, 4e-2)), attention_s=4e-8, layer_overhead_s=2e-5)
