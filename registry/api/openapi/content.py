"""Content: manifests, recipes, placements, objects, bundles; and publishing it."""

from helios import registry_answers as answers
from heliosfs.store.content import CommitContent
from heliosfs.store.placement import Placement
from registry.api.openapi.describe import (
    ANY_REPO,
    BLOB,
    BYTES,
    COMMIT,
    OCTETS,
    RANGE,
    REPO,
    Operation,
    Param,
    Table,
    bytes_of,
    number,
    ok,
)  # fmt: skip
from registry.api.pushes import StartPush

TAR = "application/x-tar"
REVISIONS = {"type": "string", "examples": ["models/org/name@main"], "description": "repository@revision"}

FAR = {"type": "object", "required": ["here", "attempt"]}

OPERATIONS: Table = [
    Operation("GET", "/api/v1/manifest", "A commit's manifest record.", "read", [REPO, COMMIT],
              answers=ok("docs/format.md; x-helios-digest has its sha256.", BYTES, OCTETS)),
    Operation("GET", "/api/v1/recipe", "A blob's recipe record.", "read", [REPO, BLOB],
              answers=ok("docs/format.md", BYTES, OCTETS)),
    Operation("GET", "/api/v1/placements", "Where a blob's chunks lie.", "read",
              [REPO, BLOB, Param("doubt", number(0, 999_999_999))], answers=ok("A placement.", Placement)),
    Operation("GET", "/api/v1/content", "Recipes and placements of a commit's largest blobs.", "read", [REPO, COMMIT],
              answers=ok("The largest first.", CommitContent)),
    Operation("GET", "/api/v1/objects/{key}", "Bytes of an object; its address comes from a placement.", "grant",
              [Param("seal", "Text"), RANGE, Param("if-range", "Text", where="header")],
              answers=bytes_of("The object.")),
    Operation("GET", "/api/v1/flights", "What this process has of a download, for the registry's others.", "grant",
              [Param("content", "Text", required=True), Param("attempt", "Text"), RANGE],
              answers={**bytes_of("The bytes, as they come."), 200: ok("How far it is.", FAR)[200]}),
    Operation("GET", "/api/v1/bundles", "Revisions as one file.", "read",
              [Param("rev", REVISIONS, many=True), Param("have", REVISIONS, many=True)],
              answers=ok("A bundle (docs/format.md).", BYTES, TAR)),
    Operation("POST", "/api/v1/bundles", "Bring a bundle in.", "admin", body=BYTES, media=TAR,
              answers=ok("What it brought.", answers.Imported)),
    Operation("POST", "/api/v1/pushes", "Start a push.", "write", body=StartPush,
              answers=ok("Its id.", answers.StartedPush)),
    Operation("PUT", "/api/v1/pushes/{push}/files", "Store a file of a push.", "grant",
              [Param("path", "Path", required=True), Param("local", "Text")], BYTES, OCTETS,
              answers=ok("What was new.", answers.StoredFile)),
    Operation("PUT", "/api/v1/pushes/{push}/recipes", "Offer a file of a push by its recipe.", "grant",
              [Param("path", "Path", required=True)], BYTES, OCTETS,
              answers=ok("The file as for a whole one, or the chunks that are missing.", {"type": "object"})),
    Operation("PUT", "/api/v1/pushes/{push}/chunks", "Send chunks of a file of a push.", "grant",
              [Param("path", "Path", required=True)], BYTES, OCTETS,
              answers=ok("What was new.", {"type": "object", "required": ["new_bytes"]})),
    Operation("POST", "/api/v1/pushes/{push}/chunks", "Ask how many of some chunks are here.", "grant",
              [Param("path", "Path", required=True)], BYTES, OCTETS,
              answers=ok("How many.", answers.KnownChunks)),
    Operation("GET", "/api/v1/pushes/{push}", "How far a push is.", "grant", answers=ok("Files.", answers.PushState)),
    Operation("DELETE", "/api/v1/pushes/{push}", "Give a push up.", "grant", answers=ok("It is gone.")),
    Operation("POST", "/api/v1/pushes/{push}/commit", "Make a push visible.", "grant",
              answers=ok("The commit.", answers.Pushed)),
    Operation("GET", "/api/v1/quarantine", "Files that are kept back.", "list", [ANY_REPO, Param("released", "Flag")],
              answers=ok("Of a repository, or of all.", answers.KeptList)),
    Operation("GET", "/api/v1/signature", "Who signed a commit.", "read", [REPO, COMMIT],
              answers=ok("null: nobody, or it was not asked for.", {"type": "object", "required": ["signer"]})),
]  # fmt: skip
