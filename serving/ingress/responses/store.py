"""The responses that are kept, for those that follow them: in the database where there is one, else by each router.

Whose a response is, only that owner can see.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from serving.errors import NotFoundError
from serving.ingress.responses.answers import Response
from serving.ingress.responses.bodies import Item
from serving.tenants.kept_responses import MAX_CHARACTERS, MAX_RESPONSES, KeptResponses


class Kept(BaseModel):
    model_config = ConfigDict(frozen=True)
    response: Response
    items: tuple[Item, ...]     # of the whole conversation, instructions aside

    @property
    def num_characters(self) -> int:
        return len(self.response.id) + sum(map(_num_characters, self.items))


class ResponseStore(Protocol):
    """`param` names the field that an error is about."""

    async def keep(self, owner: str, kept: Kept) -> None: ...

    async def get(self, owner: str, response_id: str, param: str) -> Kept:
        """Return it. Raises NotFoundError."""

    async def delete(self, owner: str, response_id: str, param: str) -> None:
        """Forget it. Raises NotFoundError."""


class MemoryStore:
    """Keeps the responses of one router; those that were not used for longest go when there are too many."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_characters: int = MAX_CHARACTERS) -> None:
        self._max_responses = max_responses
        self._max_characters = max_characters
        self._kept: OrderedDict[tuple[str, str], Kept] = OrderedDict()
        self._num_characters = 0

    async def keep(self, owner: str, kept: Kept) -> None:
        if (owner, kept.response.id) in self._kept:      # a client may use an id of its own twice
            await self.delete(owner, kept.response.id, "id")
        self._kept[owner, kept.response.id] = kept
        self._num_characters += kept.num_characters
        while len(self._kept) > self._max_responses or self._num_characters > self._max_characters:
            _, oldest = self._kept.popitem(last=False)
            self._num_characters -= oldest.num_characters

    async def get(self, owner: str, response_id: str, param: str) -> Kept:
        kept = self._kept.get((owner, response_id))
        if kept is None:
            raise _not_kept(response_id, f"a router keeps its own, the newest {self._max_responses}", param)
        self._kept.move_to_end((owner, response_id))
        return kept

    async def delete(self, owner: str, response_id: str, param: str) -> None:
        self._num_characters -= (await self.get(owner, response_id, param)).num_characters
        del self._kept[owner, response_id]


class SharedStore:
    """Keeps the responses of all routers."""

    def __init__(self, rows: KeptResponses) -> None:
        self._rows = rows

    async def keep(self, owner: str, kept: Kept) -> None:
        await self._rows.keep(owner, kept.response.id, kept.model_dump_json)

    async def get(self, owner: str, response_id: str, param: str) -> Kept:
        kept = await self._rows.get(owner, response_id, Kept.model_validate_json)
        if kept is None:
            raise self._not_kept(response_id, param)
        return kept

    async def delete(self, owner: str, response_id: str, param: str) -> None:
        if not await self._rows.delete(owner, response_id):
            raise self._not_kept(response_id, param)

    def _not_kept(self, response_id: str, param: str) -> NotFoundError:
        return _not_kept(response_id, f"of each tenant the newest {MAX_RESPONSES} are kept, for 30 days", param)


def _not_kept(response_id: str, how_long: str, param: str) -> NotFoundError:
    return NotFoundError(f"there is no response {response_id[:128]!r} here: {how_long}",
                         fix="send the whole conversation as input", param=param)


def _num_characters(item: Item) -> int:
    """Return about how many characters an item is kept in; the objects around them count too."""
    texts = [item.content, item.arguments, item.output, item.summary, item.encrypted_content]
    return 500 + sum(len(text) if isinstance(text, str) else sum(200 + len(part.text or part.refusal or "")
                                                                for part in text or ()) for text in texts)
