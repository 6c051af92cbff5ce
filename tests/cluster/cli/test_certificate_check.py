"""The doctor says for what a certificate is and how long, or what to change."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from cluster.cli.certificate_check import certificate_checks
from cluster.cli.doctor import Verdict
from serving.config import ConfigError, ServeConfig, parse_config
from tests.certificates import Authority

NOW = datetime.datetime.now(datetime.UTC)
LIFETIME = datetime.timedelta(days=1)


def config_of(tls: dict[str, str]) -> ServeConfig:
    return parse_config({"model": {"path": "x"}, "pools": [{}], "tls": tls})


def written(folder: Path) -> ServeConfig:
    certificate, key = Authority().issue("llm.example", "10.0.0.1", lifetime=LIFETIME).write(folder)
    return config_of({"certificate": certificate, "key": key})


@pytest.mark.parametrize(("later", "verdict", "says"), [
    (-datetime.timedelta(days=20), Verdict.OK, ""), (datetime.timedelta(), Verdict.WARN, ""),
    (2 * LIFETIME, Verdict.FAIL, ": expired")])
def test_its_end_is_told_in_time(tmp_path: Path, later: datetime.timedelta, verdict: Verdict, says: str) -> None:
    (check,) = certificate_checks(written(tmp_path), NOW + later)
    assert check.verdict is verdict and check.found.startswith("for llm.example, 10.0.0.1, until 20")
    assert check.found.endswith(f"UTC{says}") and bool(check.fix) == (verdict is not Verdict.OK)


def test_what_cannot_be_used_is_an_error_and_other_nodes_files_a_warning(tmp_path: Path) -> None:
    config = written(tmp_path)
    (tmp_path / "door.key").unlink()
    with pytest.raises(ConfigError, match=r"tls\.key: .*door\.key cannot be read"):
        list(certificate_checks(config, NOW))
    (tmp_path / "door.crt").unlink()
    (check,) = certificate_checks(config, NOW)
    assert check.verdict is Verdict.WARN and "not on this machine" in check.found
    assert not list(certificate_checks(parse_config({"model": {"path": "x"}, "pools": [{}]}), NOW))
