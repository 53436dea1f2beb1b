"""What the tables of calls are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Schema = dict[str, Any]

Needs = Literal["nothing", "read", "list", "write", "govern", "admin", "grant"]
"""Who may call (docs/registry-access.md): anybody; who may read, change or remove the repository; anybody, who is shown
what he may read; whoever administers the registry; who has a signed address or token that an earlier answer gave."""

HEX_40: Final = "^[0-9a-f]{40}$"
HEX_64: Final = "^[0-9a-f]{64}$"
PART: Final = "[A-Za-z0-9_]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"

NAMES: Final[Mapping[str, Schema]] = {
    "RepoName": {"type": "string", "pattern": f"^(models|datasets)/({PART}/)?{PART}$", "examples": ["models/org/name"]},
    "CommitId": {"type": "string", "pattern": HEX_40, "description": "A commit: 40 hexadecimal digits."},
    "RevisionName": {
        "type": "string",
        "minLength": 1,
        "maxLength": 250,
        "description": "A branch, tag, alias or commit.",
    },
    "RefName": {"type": "string", "pattern": "^[A-Za-z0-9_][A-Za-z0-9._/+-]*$", "maxLength": 250},
    "Sha256": {"type": "string", "pattern": HEX_64, "description": "Names a blob."},
    "Path": {"type": "string", "minLength": 1, "maxLength": 4096, "description": "A file's path in its repository."},
    "Kind": {"type": "string", "enum": ["models", "datasets"]},
    "Part": {"type": "string", "pattern": f"^{PART}$", "description": "An organisation's or a repository's own name."},
    "Key": {"type": "string", "minLength": 3, "maxLength": 1000, "description": "domain/kind/name"},
    "Text": {"type": "string"},
    "Flag": {"type": "string", "enum": ["true", "false"]},
    "Range": {"type": "string", "examples": ["bytes=0-1023"], "description": "One range of bytes (RFC 9110, 14.2)."},
}
"""Schemas of the names that parameters and bodies hold."""

FIELDS: Final[Mapping[str, str]] = {
    "repo": "RepoName", "commit": "CommitId", "ref": "RefName", "rev": "RevisionName", "sha256": "Sha256",
    "path": "Path", "oid": "Sha256", "parentCommit": "CommitId", "srcPath": "Path", "srcRevision": "RevisionName",
}  # fmt: skip
"""Which of them a text in a body is, by the field's name."""


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter; ``schema`` is a name of ``NAMES``, or a schema."""

    name: str
    schema: str | Schema
    required: bool = False
    where: Literal["query", "header"] = "query"
    many: bool = False
    """May be repeated."""

    def encode(self) -> Schema:
        schema: Schema = (
            {"$ref": f"#/components/schemas/{self.schema}"} if isinstance(self.schema, str) else self.schema
        )
        if self.many:
            schema = {"type": "array", "items": schema}
        return {"name": self.name, "in": self.where, "required": self.required, "schema": schema}


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its media type and what it holds, a struct's type or a schema; neither: no body."""

    says: str
    media: str = "application/json"
    holds: type | Schema | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One call. ``verb`` names a call of the Hub API, whose paths one route reads."""

    method: str
    path: str
    says: str
    needs: Needs
    params: Sequence[Param] = ()
    body: type | Schema | None = None
    media: str = "application/json"
    """Of the body."""
    answers: Mapping[int, Answer] = field(default_factory=dict)
    verb: str | None = None


def number(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def listing(of: str, *items: str) -> Schema:
    """An object with one list of objects that have at least these keys."""
    item = {"type": "object", "required": list(items)}
    return {"type": "object", "required": [of], "properties": {of: {"type": "array", "items": item}}}


REPO: Final = Param("repo", "RepoName", required=True)
ANY_REPO: Final = Param("repo", "RepoName")
COMMIT: Final = Param("commit", "CommitId", required=True)
BLOB: Final = Param("blob", "Sha256", required=True)
RANGE: Final = Param("range", "Range", where="header")
NOTHING: Final[Schema] = {"type": "object", "additionalProperties": False}
BYTES: Final[Schema] = {"type": "string", "format": "binary"}
OCTETS: Final = "application/octet-stream"
EVENTS: Final = "application/x-ndjson"

Table = Sequence[Operation]


def ok(says: str, holds: type | Schema | None = NOTHING, media: str = "application/json") -> dict[int, Answer]:
    """The one good answer."""
    return {200: Answer(says, media, holds)}


def bytes_of(says: str, media: str = OCTETS) -> dict[int, Answer]:
    """Bytes, whole or a range."""
    holds = BYTES if media == OCTETS else {}  # of other media they may be anything
    return {
        200: Answer(says, media, holds),
        206: Answer("The range that was asked for.", media, holds),
        416: Answer("The range lies outside.", "", None),
    }
