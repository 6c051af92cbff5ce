"""What the live page shows at one moment: plain values, bounded in size, without anything that a client sent. Pure."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from serving.ingress.http.ui.heat_map import HolderMap, LoadMap
from serving.ingress.http.ui.request_rates import RequestRates

MAX_MEMBERS = 256           # that are shown one by one
MAX_TEXT = 400              # characters of one text


@dataclass(frozen=True, slots=True)
class MemberView:
    shard_id: str
    rank: int | None                    # None: in no epoch
    node: str
    pool: str
    device: str
    state: str
    is_leaving: bool
    memory_bytes: int                   # of the process, measured
    memory_budget_bytes: int
    weights_bytes: int
    kv_cache_bytes: int
    kv_part: float | None               # of the KV blocks that are in use; None: it has none
    num_running: int
    num_waiting: int
    request_share: float                # that the plan gives it of new requests
    num_expert_copies: int
    tokens_per_s: float | None          # while it works; None: this router has no link to it
    step_s: float | None                # likewise
    own_over_profile: float | None      # seconds of its work over those that its profile says; None: not timed
    experts_over_profile: float | None
    emulated_speed: float | None
    detail: str                         # what went wrong


@dataclass(frozen=True, slots=True)
class RouterView:
    router_id: str
    node: str
    http_address: str
    is_ready: bool
    epoch: int


@dataclass(frozen=True, slots=True)
class ChangeView:
    """One change of members or of the placement. `at_s`: wall clock; None: it was not noted."""

    key: str                            # the same for the same change, however far it is
    kind: str                           # "members" or "placement"
    at_s: float | None
    text: str


@dataclass(frozen=True, slots=True)
class GroupView:
    model: str
    version: str
    health: str                         # "healthy", or the phase of the group
    why: str
    epoch: int                          # 0: none
    revision: int
    next_revision: int | None
    predicted_step_s: float | None
    bound_step_s: float | None
    straggler: str                      # a shard id; "": nobody stands out
    straggler_reason: str
    num_members: int
    members: tuple[MemberView, ...]     # at most MAX_MEMBERS
    routers: tuple[RouterView, ...]
    changes: tuple[ChangeView, ...]     # the latest, oldest first


@dataclass(frozen=True, slots=True)
class RequestsView:
    """The requests of this router."""

    at_s: float                         # wall clock
    num_held: int                       # choices that wait for admission or are open
    num_decoding: int
    num_waiting_tokens: int             # of prompts whose first token has yet to come
    rates: RequestRates


@dataclass(frozen=True, slots=True)
class Snapshot:
    group: GroupView
    requests: RequestsView
    holders: HolderMap | None           # None: no epoch, or too large to show
    load: LoadMap | None

    def events(self) -> dict[str, bytes]:
        """Return the JSON of each part by its name. A listener needs those that differ from what it has."""
        parts = {"group": self.group, "holders": self.holders, "load": self.load, "requests": self.requests}
        return {name: json.dumps(None if part is None else asdict(part), separators=(",", ":")).encode()
                for name, part in parts.items()}


def short_text(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT - 1]}…"
