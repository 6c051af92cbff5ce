"""Routers find the database of the folder that `moesaic up` was told."""

from __future__ import annotations

from pathlib import Path

from cluster.device.state_dir import database_url, with_database
from serving.config import AccessConfig, ServeConfig, parse_config

SMALLEST = {"model": {"path": "m"}, "pools": [{}]}


def test_a_database_is_in_the_folder_unless_it_is_named(tmp_path: Path) -> None:
    config = with_database(parse_config(SMALLEST | {"access": {"keys": True}}), tmp_path)
    assert config.access == AccessConfig(keys=True, database=f"sqlite:///{tmp_path}/tenants.db")
    assert ServeConfig.model_validate(config.model_dump()) == config
    assert database_url("postgresql://u@h/d", tmp_path) == "postgresql://u@h/d"
