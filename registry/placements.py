"""From rows of chunks to a blob's placement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from helios.errors import IntegrityError
from heliosfs.store.placement import NO_CODEC, ChunkLocation, PlacedObject, Placement, Run
from heliosfs.store.recipe import Recipe


def build(
    recipe: Recipe,
    locations: Mapping[bytes, ChunkLocation],
    sizes: Mapping[str, int],
    *,
    version: int,
    lease_s: float,
) -> Placement:
    """The placement of the recipe's blob; ``sizes`` are those of the objects, in bytes.

    Neighbouring chunks that lie back to back in one object with the same codec and key make one run. Raises
    IntegrityError when a chunk is nowhere.
    """
    order: dict[str, int] = {}
    groups: list[list[ChunkLocation]] = []
    firsts: list[int] = []
    for index, (digest, length) in enumerate(recipe.chunks()):
        location = locations.get(digest)
        if location is None or location.length != length:
            raise IntegrityError(f"chunk {index} ({digest.hex()}) of blob {recipe.blob} is not in the index")
        order.setdefault(location.object_key, len(order))
        if groups and _follows(groups[-1][-1], location):
            groups[-1].append(location)
        else:
            groups.append([location])
            firsts.append(index)
    objects = [PlacedObject(key, f"/api/v1/objects/{quote(key)}", sizes[key]) for key in order]
    runs = [_run(first, group, order) for first, group in zip(firsts, groups, strict=True)]
    return Placement(recipe.blob, version, lease_s, objects, runs)


def _follows(before: ChunkLocation, location: ChunkLocation) -> bool:
    return (
        location.object_key == before.object_key
        and location.offset == before.offset + before.encoded_length
        and location.codec == before.codec
        and location.key == before.key
    )


def _run(first: int, group: Sequence[ChunkLocation], order: Mapping[str, int]) -> Run:
    head = group[0]
    plain = head.codec == NO_CODEC and head.key is None
    encoded = None if plain else [location.encoded_length for location in group]
    return Run(first, len(group), order[head.object_key], head.offset, head.codec, head.key, encoded)
