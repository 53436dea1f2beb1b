"""The Hub API's upload calls (docs/hub-uploads.md)."""

from __future__ import annotations

from registry.api.openapi.describe import BYTES, OCTETS, Answer, Operation, Param, Schema, Table, ok
from registry.api.openapi.hub import BASE, OBJECT, TOKEN
from registry.hub.upload.lfs import Batch, Object
from registry.hub.upload.parts import Whole
from registry.hub.upload.preupload import Preupload
from registry.hub.upload.repos import CreateBranch, CreateRepo, CreateTag, Readme

LINES: Schema = {"type": "string", "description": "Lines of JSON: a header, then operations (docs/hub-uploads.md)."}
LFS = "/{org}/{name}.git/info/lfs/objects"
MEDIA = "application/vnd.git-lfs+json"
CREATE_PR = Param("create_pr", "Flag")

OPERATIONS: Table = [
    Operation("POST", "/api/repos/create", "Make a repository.", "write", body=CreateRepo,
              answers=ok("Where it is.", OBJECT), verb="create"),
    Operation("DELETE", "/api/repos/delete", "Remove a repository.", "govern", body=CreateRepo,
              answers=ok("It is gone.", OBJECT), verb="delete"),
    Operation("POST", "/api/validate-yaml", "Whether the head of a README is a card.", "nothing", body=Readme,
              answers=ok("It is.", OBJECT) | {400: Answer("It is not.", holds=OBJECT)}, verb="validate-yaml"),
    Operation("POST", BASE + "/preupload/{revision}", "How each file is to be sent.", "write", body=Preupload,
              answers=ok("In the commit, or over LFS.", OBJECT), verb="preupload"),
    Operation("POST", BASE + "/commit/{revision}", "Make a commit.", "write", [CREATE_PR], LINES,
              "application/x-ndjson", ok("The commit.", OBJECT), "commit"),
    Operation("POST", BASE + "/branch/{revision}", "Make a branch.", "write", body=CreateBranch,
              answers=ok("Its name.", OBJECT), verb="branch"),
    Operation("DELETE", BASE + "/branch/{revision}", "Remove a branch.", "write",
              answers=ok("It is gone.", OBJECT), verb="branch"),
    Operation("POST", BASE + "/tag/{revision}", "Make a tag.", "write", body=CreateTag,
              answers=ok("Its name.", OBJECT), verb="tag"),
    Operation("DELETE", BASE + "/tag/{revision}", "Remove a tag.", "write",
              answers=ok("It is gone.", OBJECT), verb="tag"),
    Operation("POST", LFS + "/batch", "Where LFS objects are to be sent.", "write", body=Batch,
              answers=ok("An address for each that is not here.", OBJECT, MEDIA), verb="lfs"),
    Operation("POST", LFS + "/verify", "Whether an LFS object is here.", "write", body=Object,
              answers=ok("It is.", OBJECT, MEDIA), verb="lfs"),
    Operation("PUT", LFS + "/{grant}", "An LFS object's bytes, or a part of them.", "grant", body=BYTES, media=OCTETS,
              answers={200: Answer("They are here.", "", None)}, verb="lfs-object"),
    Operation("POST", LFS + "/{grant}", "All parts of an LFS object were sent.", "grant", body=Whole,
              answers=ok("It is here.", OBJECT), verb="lfs-object"),
    Operation("GET", BASE + "/xet-write-token/{revision}", "An access token for uploads over Xet.", "write",
              answers=ok("For this repository.", TOKEN), verb="xet-write-token"),
]  # fmt: skip
