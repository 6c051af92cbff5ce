"""The databases of keys are those of files and batches."""

from __future__ import annotations

from tests.serving.tenants.conftest import engine, postgresql, url  # noqa: F401
