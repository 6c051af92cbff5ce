"""The error of all planning. Pure."""

from __future__ import annotations

from serving.errors import ServingError


class PlacementError(ServingError):
    """There is no placement, or what it is to be made from is wrong. The message has the values, `fix` the way out."""
