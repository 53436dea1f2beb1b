"""Searching what is held: the filters and orders of ``GET /api/models`` and ``GET /api/datasets``, without I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from helios.errors import InvalidInput
from helios.names import RepoId
from registry.hub.asked import flag

Json = dict[str, Any]

TIMES: Final = {"lastModified": "lastModified", "last_modified": "lastModified", "createdAt": "createdAt",
                "created_at": "createdAt"}  # fmt: skip
COUNTS: Final = ("downloads", "likes", "trendingScore", "trending_score")
"""Orders by what is not counted here: all are equal, so names decide."""
UNKNOWN: Final = ("apps", "inference", "inference_provider", "num_parameters", "emissions_thresholds")
"""Filters by what is not known of any repository here: nothing passes them."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a list is asked for."""

    search: str
    author: str
    tags: tuple[str, ...]
    pipeline: str
    nothing: bool
    sort: str | None
    descending: bool
    full: bool
    card: bool
    expand: tuple[str, ...]

    @classmethod
    def read(cls, query: Mapping[str, str], tags: Sequence[str], expand: Sequence[str]) -> Wanted:
        """Read the query. Raises InvalidInput for an order that there is not."""
        sort, direction = query.get("sort"), query.get("direction", "-1")
        if sort is not None and sort not in (*TIMES, *COUNTS):
            raise InvalidInput(f"sort={sort[:40]!r} is no order; there are {', '.join((*TIMES, *COUNTS))}")
        if direction not in ("-1", "1"):
            raise InvalidInput(f"direction={direction[:40]!r} is neither -1, from the highest down, nor 1")
        gated = query.get("gated")
        return cls(
            query.get("search", ""), query.get("author", ""), tuple(tags), query.get("pipeline_tag", ""),
            any(query.get(name) for name in UNKNOWN) or (gated is not None and flag(gated)),
            TIMES.get(sort or ""), direction == "-1", flag(query.get("full")), flag(query.get("cardData")),
            tuple(expand),
        )  # fmt: skip

    def names(self, repo: RepoId) -> bool:
        """Whether the repository's name is wanted."""
        return not self.nothing and self.search.lower() in repo.id.lower() and self.author in ("", repo.org)

    def takes(self, item: Json) -> bool:
        """Whether what is known of the repository is wanted."""
        return set(self.tags) <= set(item["tags"]) and self.pipeline in ("", item.get("pipeline_tag"))

    def key(self, item: Json) -> str:
        """What the list is ordered by; equal keys are ordered by id. It is part of the cursor."""
        return str(item[self.sort]) if self.sort else ""

    def follows(self, position: tuple[str, str], after: tuple[str, str]) -> bool:
        """Whether (key, id) comes behind the last one of the page before."""
        if position[0] == after[0]:
            return position[1] > after[1]
        return (position[0] < after[0]) if self.descending else (position[0] > after[0])

    def order(self, items: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """(key, id) in the list's order."""
        return sorted(sorted(items, key=lambda i: i[1]), key=lambda i: i[0], reverse=self.descending)


def pick(item: Json, expand: Sequence[str]) -> Json:
    """Only the properties that ``expand`` names, and the ids; those that are not known here are left out."""
    return {key: value for key, value in item.items() if key in {"_id", "id", "modelId", *expand}}
