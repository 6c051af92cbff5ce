"""Keys are made, shown once, listed without their secrets, and revoked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.main import app
from serving.errors import InvalidRequestError
from serving.tenants.database import open_database
from serving.tenants.key import Limits, Scope, hash_of
from serving.tenants.key_store import KeyStore


def run(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments, "--state-dir", str(folder)])


def test_a_key_from_its_making_to_its_end(tmp_path: Path) -> None:
    made = run(tmp_path, "create", "ada", "--tenant", "team", "--scope", "infer", "--scope", "status",
               "--expires", "12h", "--tokens-per-day", "1000", "--max-tokens", "7", "--model", "m", "--priority", "9")
    assert made.exit_code == 0, made.output
    secret = made.stdout.strip().splitlines()[-1]
    engine = open_database(f"sqlite:///{tmp_path}/tenants.db")
    (key,) = KeyStore(engine).all()
    engine.dispose()
    assert key.secret_hash == hash_of(secret) and key.limits == Limits(tokens_per_day=1000, max_tokens=7)
    assert (key.name, key.tenant, key.scopes, key.models, key.priority) == (
        "ada", "team", {Scope.INFER, Scope.STATUS}, {"m"}, 9)
    assert key.expires_s == pytest.approx(key.created_s + 12 * 3600)
    (listed,) = json.loads(run(tmp_path, "list", "--json").stdout)
    assert listed["state"] == "valid" and listed["limits"]["tokens_per_day"] == 1000
    table = run(tmp_path, "list").stdout
    assert "ada" in table and secret not in table and secret[-43:] not in json.dumps(listed)
    assert run(tmp_path, "revoke", key.key_id).exit_code == 0
    assert json.loads(run(tmp_path, "list", "--json").stdout)[0]["state"] == "revoked"
    assert isinstance(run(tmp_path, "revoke", key.key_id).exception, InvalidRequestError)


def test_a_tenants_keys_have_one_weight(tmp_path: Path) -> None:
    for arguments in (("a", "--tenant", "t"), ("b", "--tenant", "t", "--weight", "3"), ("c", "--tenant", "t"), ("d",)):
        assert run(tmp_path, "create", *arguments).exit_code == 0
    weights = {key["name"]: key["weight"] for key in json.loads(run(tmp_path, "list", "--json").stdout)}
    assert weights == {"a": 3, "b": 3, "c": 3, "d": 1} and "weight" in run(tmp_path, "list").stdout
    assert run(tmp_path, "create", "e", "--weight", "0").exit_code == 2


@pytest.mark.parametrize("arguments", [("a b",), ("ok", "--tenant", "\n"), ("ok", "--expires", "soon"),
                                       ("ok", "--expires", "0d")])
def test_wrong_values_are_named(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert isinstance(run(tmp_path, "create", *arguments).exception, InvalidRequestError)
