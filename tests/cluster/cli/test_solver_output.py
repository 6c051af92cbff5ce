"""All that a library writes to the process's standard output goes to standard error meanwhile."""

from __future__ import annotations

import os

import pytest

from cluster.cli.solver_output import solver_output_to_stderr


def test_only_our_own_output_is_left(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(1, b"before ")
    with solver_output_to_stderr():
        os.write(1, b"solver")
    os.write(1, b"after")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("before after", "solver")


def test_an_error_gives_the_output_back(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), solver_output_to_stderr():
        raise RuntimeError
    os.write(1, b"after")
    assert capfd.readouterr().out == "after"
