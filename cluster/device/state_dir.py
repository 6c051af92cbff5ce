"""The folder of this machine where running applications are noted, and keys unless the config says where."""

from __future__ import annotations

from pathlib import Path

import platformdirs

from serving.config import ServeConfig

STATE_DIR_VARIABLE = "MOESAIC_STATE_DIR"


def default_state_dir() -> Path:
    return platformdirs.user_state_path("moesaic")


def database_url(configured: str | None, state_dir: Path) -> str:
    """Return where keys are; by default in a file that all applications of the folder share."""
    return configured or f"sqlite:///{(state_dir / 'tenants.db').absolute()}"


def with_database(config: ServeConfig, state_dir: Path) -> ServeConfig:
    """Name the database of keys, so that routers find that of this folder and not of another."""
    if not config.access.keys:
        return config
    url = database_url(config.access.database, state_dir)
    return config.model_copy(update={"access": config.access.model_copy(update={"database": url})})
