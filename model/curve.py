"""Names the type of a measured curve. Pure."""

from __future__ import annotations

Curve = tuple[tuple[int, float], ...]       # (rows, value), ascending in rows
