"""Placements and shares that many tests use."""

from __future__ import annotations

from model.placement import Placement
from serving.link.epoch import RequestShare


def contiguous_placement(num_layers: int, num_experts: int, shares: tuple[int, ...]) -> Placement:
    """One copy of every expert; rank r holds the next `shares[r]` of them. sum(shares) must be num_experts."""
    if sum(shares) != num_experts or min(shares) < 0:
        raise ValueError(f"shares {shares} must be >= 0 and add up to num_experts={num_experts}")
    owner = [rank for rank, share in enumerate(shares) for _ in range(share)]
    layer = tuple((rank,) for rank in owner)
    return Placement(num_members=len(shares), holders=(layer,) * num_layers)


def even_shares(num_members: int, token_budget: int = 512) -> tuple[RequestShare, ...]:
    """All take as many requests."""
    return (RequestShare(1.0 / num_members, token_budget),) * num_members
