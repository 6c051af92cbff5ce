"""A part of a list, as clients ask for it, and how a table is asked for it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sqlalchemy import Column, Select, tuple_

OBJECT_ID = re.compile(r"(file-|batch_)[0-9a-f]{24}")       # nothing else is looked for
Place = tuple[float, str]       # of a row in a list: when it was made, and its id


@dataclass(frozen=True, slots=True)
class Page:
    """At most `limit` rows, behind the one with the id `after`."""

    limit: int
    after: str | None = None
    newest_first: bool = True

    def of(self, query: Select[tuple[object, ...]], made_s: Column[float], row_id: Column[str], start: Place | None
           ) -> Select[tuple[object, ...]]:
        """Return the query for the rows behind the place `start`, and one more, which tells that there are more."""
        place = tuple_(made_s, row_id)
        if start is not None:
            query = query.where(place < start if self.newest_first else place > start)
        order = [column.desc() if self.newest_first else column.asc() for column in (made_s, row_id)]
        return query.order_by(*order).limit(self.limit + 1)
