"""The expected cost of the exchange of rows around one MoE layer. Pure.

M members, E experts
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from model.arrays import FloatArray
from serving.link.epoch import DeviceProfile

NUM_COLLECTIVES = 2         # there and back


def collective_bytes(profiles: Sequence[DeviceProfile]) -> int | None:
    """Return the bytes that the slowest link carries in the time that one collective less saves all.

    It saves a collective, and the wait for the member that is slowest to plan what comes next. None when a link is not
    known.
    """
    links = [profile.link for profile in profiles if profile.link is not None]
    if not links or len(links) < len(profiles):
        return None
    saved_s = max(link.latency_s for link in links) + max(profile.layer_overhead_s for profile in profiles)
    return int(saved_s * min(link.bytes_per_s for link in links))


def exchange_seconds(profiles: Sequence[DeviceProfile], rows_M: FloatArray, probability_E: FloatArray,
                     split_EM: FloatArray, row_bytes: int) -> FloatArray:
    """Return what each member takes in one layer: two collectives of the slowest latency, and its bytes over its link.

    A row goes once to each other member that computes one of its experts; every (row, expert) output comes back.
    Experts are taken as chosen independently, and the copy of an expert as independent of who owns the row. A member
    that neither owns rows nor computes experts takes no part, and one without a measured link costs nothing.
    """
    takes_part_M = (rows_M > 0) | (split_EM.sum(axis=0) > 0)
    if takes_part_M.sum() < 2:
        return np.zeros(len(profiles))
    links = [profile.link for profile in profiles]
    latency_s = max((link.latency_s for link, takes in zip(links, takes_part_M, strict=True) if link and takes),
                    default=0.0)
    reach_M = 1.0 - np.exp(np.log1p(-np.minimum(probability_E[:, None] * split_EM, 1 - 1e-12)).sum(axis=0))
    sent_rows_M = rows_M * (reach_M.sum() - reach_M)
    returned_M = (probability_E[:, None] * split_EM).sum(axis=0) * (rows_M.sum() - rows_M)
    bytes_M = (sent_rows_M + returned_M) * row_bytes
    per_byte_M = np.array([1.0 / link.bytes_per_s if link else 0.0 for link in links])
    return np.where(takes_part_M, NUM_COLLECTIVES * latency_s + bytes_M * per_byte_M, 0.0)


def least_exchange_seconds(profiles: Sequence[DeviceProfile], num_rows: float, probability_E: FloatArray,
                           slots_M: Sequence[int], row_bytes: int) -> float:
    """Return the time of one layer below which no placement in these slots and no shares of the rows exchange.

    A member computes at most the hottest experts that its slots hold. So of every row, whoever owns it, a part of the
    outputs comes from others; and they are the fewest others when those with the most slots compute all they can. All
    bytes together leave over all links together at best.
    """
    if any(slots >= len(probability_E) for slots in slots_M):
        return 0.0                      # one member can do without the others
    links = [profile.link for profile in profiles]
    latency_s = sorted(link.latency_s if link else 0.0 for link in links)[1]
    if any(link is None for link in links):
        return NUM_COLLECTIVES * latency_s
    hottest_E = np.sort(probability_E)[::-1]
    most_M = [float(hottest_E[:slots].sum()) for slots in slots_M]
    returned = min(float(probability_E.sum()) - most for most in most_M)
    reached = min(_least_reach(most_M[:owner] + most_M[owner + 1:], float(probability_E.sum()) - most)
                  for owner, most in enumerate(most_M))
    all_bytes_per_s = sum(link.bytes_per_s for link in links if link)
    return NUM_COLLECTIVES * latency_s + num_rows * (returned + reached) * row_bytes / all_bytes_per_s


def _least_reach(most_M: Sequence[float], chosen: float) -> float:
    """Return how many others at least are expected to compute `chosen` experts of a row, each at most so many."""
    reached = 0.0
    for most in sorted(most_M, reverse=True):
        reached += 1.0 - math.exp(-min(most, max(0.0, chosen)))
        chosen -= most
    return reached
