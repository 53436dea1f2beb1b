"""The Hub API's read side (docs/hub-api.md). A repository's id may also be one segment, without an organisation."""

from __future__ import annotations

from registry.api.openapi.describe import RANGE, Answer, Operation, Param, Schema, Table, bytes_of, number, ok

BASE = "/api/{kind}/{org}/{name}"
OBJECT: Schema = {"type": "object"}
ITEMS: Schema = {"type": "array", "items": OBJECT}
EXPAND = Param("expand", "Flag")
LIMIT = Param("limit", number(1, 999_999_999))
CURSOR = Param("cursor", "Text")
PATHS: Schema = {
    "type": "object",
    "required": ["paths"],
    "properties": {"paths": {"type": "array", "items": {"type": "string"}}, "expand": {"type": "boolean"}},
}
TOKEN: Schema = {"type": "object", "required": ["casUrl", "accessToken", "exp"]}
FILE = (
    bytes_of("The file.", "*/*")
    | {302: Answer("It lies in an object store.", "", None)}
    | {304: Answer("As it was.", "", None)}
)
CONDITIONS = [RANGE, Param("if-none-match", "Text", where="header"), Param("if-range", "Text", where="header")]
LIST = [
    Param(name, "Text")
    for name in (
        "search",
        "author",
        "filter",
        "pipeline_tag",
        "sort",
        "direction",
        "full",
        "cardData",
        "expand",
        "gated",
    )
]


def read(verb: str, path: str, says: str, answer: str, holds: Schema = OBJECT, *params: Param) -> Operation:
    return Operation("GET", path, says, "read", params, answers=ok(answer, holds), verb=verb)


OPERATIONS: Table = [
    Operation("GET", "/api/{kind}", "Repositories, by name and tag.", "list", [*LIST, LIMIT, CURSOR],
              answers=ok("A page; Link has the next.", ITEMS), verb="list"),
    read("info", BASE, "A repository at its main branch.", "What it holds.", OBJECT,
         Param("blobs", "Flag"), Param("securityStatus", "Flag"), Param("expand", "Text", many=True)),
    read("info", BASE + "/revision/{revision}", "A repository at a revision.", "What it holds.", OBJECT,
         Param("blobs", "Flag"), Param("expand", "Text", many=True)),
    read("tree", BASE + "/tree/{revision}", "The root directory.", "A page; Link has the next.", ITEMS,
         Param("recursive", "Flag"), EXPAND, LIMIT, CURSOR),
    read("tree", BASE + "/tree/{revision}/{path}", "A directory.", "A page; Link has the next.", ITEMS,
         Param("recursive", "Flag"), EXPAND, LIMIT, CURSOR),
    Operation("POST", BASE + "/paths-info/{revision}", "What some paths are.", "read", body=PATHS,
              answers=ok("Those that exist.", ITEMS), verb="paths-info"),
    read("refs", BASE + "/refs", "Branches and tags.", "By kind.", OBJECT, Param("include_prs", "Flag")),
    read("commits", BASE + "/commits/{revision}", "The history.", "A page; Link has the next.", ITEMS,
         Param("limit", number(1, 999_999_999)), Param("p", number(0, 999_999_999)), Param("expand[]", "Text")),
    read("safetensors-metadata", BASE + "/safetensors-metadata/{path}", "An index and its shards' headers.", "Both."),
    read("lfs-files", BASE + "/lfs-files", "The LFS files.", "Of the main branch.", ITEMS),
    read("auth-check", BASE + "/auth-check", "Whether the caller may read.", "He may."),
    Operation("GET", BASE + "/auth-check/{what}", "Whether the caller may write (what=write).", "write",
              answers=ok("He may.", OBJECT), verb="auth-check"),
    read("xet-read-token", BASE + "/xet-read-token/{revision}", "An access token for Xet.", "For this one.", TOKEN),
    Operation("GET", "/{org}/{name}/resolve/{revision}/{path}", "A model's file.", "read", CONDITIONS,
              answers=FILE, verb="resolve"),
    Operation("GET", "/datasets/{org}/{name}/resolve/{revision}/{path}", "A dataset's file.", "read", CONDITIONS,
              answers=FILE, verb="resolve"),
    Operation("GET", "/api/whoami-v2", "Which tenant's token this is.", "nothing",
              answers=ok("The tenant.", OBJECT), verb="whoami"),
]  # fmt: skip
