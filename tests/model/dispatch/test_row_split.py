"""The split is legal, the same everywhere, close to the best, and better than a rule that does not know the counts."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from model.dispatch.row_split import layer_copies, split_rows
from model.placement import ExpertRate
from tests.deadlines import PATIENCE_S

Rates = tuple[ExpertRate, ...]
Holders = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Layer:
    holders: Holders
    rates: Rates
    num_rows_EO: np.ndarray         # rows of each expert that each member owns

    @property
    def num_rows_E(self) -> np.ndarray:
        return self.num_rows_EO.sum(axis=1)

    def split(self) -> np.ndarray:
        return split_rows(layer_copies(self.holders, len(self.rates), self.rates), self.num_rows_E)


def some_layer(rng: random.Random, rows_of_member: int, speeds: Sequence[float], rows_while_reading: float,
               start_part: float = 0.0, num_experts: int = 16, num_experts_per_token: int = 2) -> Layer:
    """Members of these speeds, most experts on two or three of them, tokens that prefer some experts."""
    members = range(len(speeds))
    holders = tuple(tuple(sorted(rng.sample(members, min(len(speeds), rng.choice((1, 2, 2, 2, 3))))))
                    for _ in range(num_experts))
    popularity = [rng.paretovariate(1.5) for _ in range(num_experts)]
    num_rows_EO = np.zeros((num_experts, len(speeds)), dtype=np.int64)
    for owner in members:
        for _ in range(rows_of_member):
            keys = [rng.random() ** (1.0 / weight) for weight in popularity]
            for expert in sorted(range(num_experts), key=keys.__getitem__)[-num_experts_per_token:]:
                num_rows_EO[expert, owner] += 1
    read_s = rows_while_reading
    rates = tuple(ExpertRate(read_s / speed, 1.0 / speed, start_part * read_s / speed) for speed in speeds)
    return Layer(holders, rates, num_rows_EO)


def step_seconds(num_rows_EM: np.ndarray, rates: Rates) -> float:
    """Return when the slowest member is done."""
    return max(sum(rate.seconds(rows) for rows in num_rows_EM[:, rank].tolist()) for rank, rate in enumerate(rates))


def static_split(layer: Layer) -> np.ndarray:
    """A rule without counts: the owner's own copy, else the copies take turns by (owner + expert)."""
    num_rows_EM = np.zeros_like(layer.num_rows_EO)
    for (expert, owner), rows in np.ndenumerate(layer.num_rows_EO):
        ranks = layer.holders[expert]
        num_rows_EM[expert, owner if owner in ranks else ranks[(owner + expert) % len(ranks)]] += rows
    return num_rows_EM


def least_seconds(layer: Layer) -> float:
    """No split is faster: the bound that HiGHS proves for the exact problem with fractions of rows.

    Variables of each (expert, holder): rows, whether it reads the weights, seconds; and the step's seconds.
    """
    pairs = [(expert, rank) for expert, ranks in enumerate(layer.holders) for rank in ranks]
    count, num_rows_E = len(pairs), layer.num_rows_E
    expert_P, rank_P = np.array(pairs).T
    rates = [layer.rates[rank] for rank in rank_P]
    read_P, row_P, start_P = np.array([(rate.read_s, rate.row_s, rate.start_s) for rate in rates]).T
    one, none, no_step = np.eye(count), np.zeros((count, count)), np.zeros((count, 1))
    of_expert = (expert_P == np.arange(len(layer.holders))[:, None]).astype(float)
    of_rank = (rank_P == np.arange(len(layer.rates))[:, None]).astype(float)
    reads_if_rows = np.hstack((-one, np.diag(num_rows_E[expert_P].astype(float)), none, no_step))
    as_long_as_reading = np.hstack((none, -np.diag(read_P), one, no_step))
    as_long_as_rows = np.hstack((-np.diag(row_P), -np.diag(start_P), one, no_step))
    all_rows = np.hstack((of_expert, np.zeros((len(of_expert), 2 * count + 1))))
    step_is_latest = np.hstack((np.zeros((len(of_rank), 2 * count)), -of_rank, np.ones((len(of_rank), 1))))
    at_least_zero = np.vstack((reads_if_rows, as_long_as_reading, as_long_as_rows, step_is_latest))
    integrality = np.repeat([0, 1, 0], (count, count, count + 1))
    upper = np.repeat([np.inf, 1.0, np.inf], (count, count, count + 1))
    result = milp(np.r_[np.zeros(3 * count), 1.0], integrality=integrality, bounds=Bounds(0.0, upper),
                  constraints=(LinearConstraint(at_least_zero, 0.0, np.inf),
                               LinearConstraint(all_rows, num_rows_E, num_rows_E)),
                  options={"mip_rel_gap": 2e-3, "node_limit": 20_000})
    return float(result.mip_dual_bound)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    num_members, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    ranks = st.lists(st.integers(0, num_members - 1), min_size=1, max_size=num_members, unique=True)
    holders = tuple(tuple(sorted(draw(ranks))) for _ in range(num_experts))
    seconds = st.floats(1e-9, 1e3)
    reads = [draw(st.just(0.0) | seconds) for _ in range(num_members)]
    parts = st.sampled_from([0.0, 0.5, 1.0])
    rates = tuple(ExpertRate(read_s, draw(seconds), draw(parts) * read_s) for read_s in reads)
    rows = st.integers(0, 6) | st.integers(0, 100_000)
    counts = draw(st.lists(rows, min_size=num_experts * num_members, max_size=num_experts * num_members))
    return Layer(holders, rates, np.array(counts, dtype=np.int64).reshape(num_experts, num_members))


@settings(max_examples=300)
@given(layer=layers())
def test_every_row_is_computed_once_by_a_holder(layer: Layer) -> None:
    num_rows_EM = layer.split()
    assert num_rows_EM.sum(axis=1).tolist() == layer.num_rows_E.tolist()
    assert num_rows_EM.min() >= 0
    for expert, ranks in enumerate(layer.holders):
        assert set(num_rows_EM[expert].nonzero()[0].tolist()) <= set(ranks)


@pytest.mark.parametrize("rows_of_member", [1, 2, 4])
@pytest.mark.parametrize("speeds", [(1, 1, 1), (4, 2, 1, 1)], ids=str)
def test_few_rows_of_an_expert_go_to_one_copy(rows_of_member: int, speeds: tuple[float, ...]) -> None:
    rng = random.Random(rows_of_member)
    for _ in range(30):
        layer = some_layer(rng, rows_of_member, speeds, rows_while_reading=16)
        assert max(layer.num_rows_E) <= 16
        num_copies_used_E = (layer.split() > 0).sum(axis=1)
        assert num_copies_used_E.tolist() == (layer.num_rows_E > 0).astype(int).tolist()


@pytest.mark.parametrize(("rows_of_member", "within"), [(1, 1.0), (8, 1.1), (64, 1.08), (512, 1.03), (2048, 1.01)])
@pytest.mark.parametrize("speeds", [(1, 1, 1), (4, 2, 1, 1)], ids=str)
@pytest.mark.parametrize("start_part", [0.0, 0.6])
def test_close_to_the_least_possible(rows_of_member: int, within: float, speeds: tuple[float, ...],
                                     start_part: float) -> None:
    rng = random.Random(rows_of_member)
    ratios = []
    for _ in range(6):
        layer = some_layer(rng, rows_of_member, speeds, rng.choice((4, 16, 60)), start_part)
        ratios.append(step_seconds(layer.split(), layer.rates) / least_seconds(layer))
    assert max(ratios) <= within + 0.003 + 0.01 * (start_part > 0)      # the solver's gap; each part starts anew


@pytest.mark.parametrize("rows_of_member", [1, 4, 16, 128])
def test_never_worse_than_a_rule_without_counts(rows_of_member: int) -> None:
    rng = random.Random(rows_of_member)
    for _ in range(100):
        speeds = [rng.choice((1.0, 1.0, 2.0, 4.0)) for _ in range(rng.randint(2, 5))]
        layer = some_layer(rng, rows_of_member, speeds, rng.choice((0, 4, 16, 60)), rng.choice((0.0, 0.6, 1.0)))
        ours, static = (step_seconds(rows, layer.rates) for rows in (layer.split(), static_split(layer)))
        assert ours <= static * (1 + 1e-9)


def test_a_slow_member_gets_its_part_of_an_experts_rows() -> None:
    rates = (ExpertRate(1.0, 1.0), ExpertRate(4.0, 4.0))
    copies = layer_copies(((0, 1),), 2, rates)
    assert split_rows(copies, np.array([1000])).tolist() == [[800, 200]]
    assert split_rows(copies, np.array([3])).tolist() == [[3, 0]]       # its one row would take longer


def test_an_expert_that_others_must_make_room_for() -> None:
    """Members 0 and 1 are busy alike; only moving expert 1 on to member 2 makes room for expert 0."""
    copies = layer_copies(((0, 1), (1, 2), (0,), (1,)), 3, (ExpertRate(0.0, 1.0),) * 3)
    num_rows_EM = split_rows(copies, np.array([300, 300, 100, 100]))
    assert num_rows_EM.sum(axis=0).tolist() == pytest.approx([267, 267, 266], abs=3)


def test_without_rates_all_members_are_alike() -> None:
    split = split_rows(layer_copies(((0, 1, 2), (1,)), 3, ()), np.array([300, 0]))
    assert split.tolist() == [[100, 100, 100], [0, 0, 0]]


def test_the_same_in_another_process() -> None:
    """Not even the order of a hash decides."""
    program = ("import random, tests.model.dispatch.test_row_split as t; rng = random.Random(1);"
               "print([t.some_layer(rng, 40, (4, 2, 1, 1), 8.0).split().tolist() for _ in range(20)])")
    rng = random.Random(1)
    expected = str([some_layer(rng, 40, (4, 2, 1, 1), 8.0).split().tolist() for _ in range(20)])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                            timeout=PATIENCE_S)
    assert result.stdout.strip() == expected
