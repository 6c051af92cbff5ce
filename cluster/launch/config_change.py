"""What differs between the config of a running service and another one, and what to do about it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from serving.config import ServeConfig


@dataclass(frozen=True, slots=True)
class Changed:
    """One value. Pools and local nodes are named, so that another order is no change."""

    key: tuple[str, ...]        # ("pools", "cpu", "replicas")
    running: object             # None: there is no such key
    given: object

    def __str__(self) -> str:
        return f"{'.'.join(self.key)} is {self.running} there and {self.given} here"


def changes(running: ServeConfig, given: ServeConfig) -> tuple[Changed, ...]:
    """Return every value that differs."""
    before, after = (dict(_values((), config.model_dump(mode="json"))) for config in (running, given))
    return tuple(Changed(key, before.get(key), after.get(key)) for key in {**before, **after}
                 if before.get(key) != after.get(key))


def what_to_do(changed: Sequence[Changed]) -> str:
    """Return the way to a service with those changes."""
    sizes = [change for change in changed if change.key[0] == "pools" and change.key[-1] == "replicas"
             and None not in (change.running, change.given)]
    ways = [f"`moesaic scale {change.key[1]} {change.given}` changes a pool while it serves" for change in sizes]
    if len(sizes) < len(changed):
        ways.append(f"for a change of {'anything else' if sizes else 'that'} its processes have to begin anew: "
                    "`moesaic down`, then `moesaic up`; or start the new one beside it, under another application and "
                    "other ports, and stop this one when its clients have gone over")
    return "; ".join(ways)


def _values(key: tuple[str, ...], value: object) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _values((*key, name), inner)
    elif isinstance(value, list) and value and all(isinstance(entry, Mapping) and "name" in entry for entry in value):
        for entry in value:
            yield from _values((*key, entry["name"]), entry)
    else:
        yield key, value
