"""The placement certificate, in short: what the recorded one promises holds for the first instances."""

from __future__ import annotations

import pytest

from benchmarks.placement import Certificate, certify


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    return certify(12, time_limit_s=12.0)       # what else runs on the machine takes its part of the time


def test_ours_is_within_a_hundredth_of_the_bound(certificate: Certificate) -> None:
    assert max(certificate.methods["ours, exact"].ratios) <= 1.01


def test_no_method_beats_the_bound(certificate: Certificate) -> None:
    assert all(min(method.ratios) >= 1 - 1e-6 for method in certificate.methods.values())


def test_ours_beats_the_others(certificate: Certificate) -> None:
    ours = certificate.methods["ours, exact"].ratios
    for name in ("contiguous", "even", "speed-LPT"):
        theirs = certificate.methods[name].ratios
        assert all(one <= other * 1.003 for one, other in zip(ours, theirs, strict=True))


def test_replans_move_little_more_than_was_lost(certificate: Certificate) -> None:
    assert certificate.replans
    assert all(replan.moved <= 1.1 * replan.least for replan in certificate.replans)
