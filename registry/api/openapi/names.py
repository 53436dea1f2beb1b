"""Repositories, refs, commits, notices, and what is known of the process."""

from helios import registry_answers as answers
from registry.api.names import MAX_HISTORY, MoveRef, PodAsks
from registry.api.notices import PutNotice
from registry.api.openapi.describe import ANY_REPO, REPO, Answer, Operation, Param, Table, listing, number, ok
from registry.api.quotas import PutPriority
from registry.usage.routes import ReadReport

TEXT = {"type": "string"}
LIMIT = Param("limit", number(1, MAX_HISTORY))
TIME = number(0, 10**11)
NAMESPACE = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
REF = Param("ref", "RefName", required=True)

OPERATIONS: Table = [
    Operation("GET", "/healthz", "Whether the process answers.", "nothing",
              answers=ok("It does.", TEXT, "text/plain")),
    Operation("GET", "/readyz", "Whether the metadata and the store answer.", "nothing",
              answers=ok("They do.", TEXT, "text/plain") | {503: Answer("They don't.")}),
    Operation("GET", "/metrics", "Metrics for Prometheus.", "nothing",
              answers=ok("The exposition format.", TEXT, "text/plain")),
    Operation("GET", "/openapi.json", "This document.", "nothing",
              answers=ok("OpenAPI 3.1.", {"type": "object", "required": ["openapi", "paths"]})),
    Operation("GET", "/api/v1/repos", "All repositories.", "list",
              answers=ok("Sorted by name.", answers.RepoList)),
    Operation("DELETE", "/api/v1/repos", "Remove a repository, or one ref of it.", "govern",
              [REPO, Param("ref", "RefName"), Param("expect", "CommitId")], answers=ok("It is gone.")),
    Operation("GET", "/api/v1/refs", "A repository's refs.", "read", [REPO],
              answers=ok("Commits by name; what is no branch, by kind.", answers.RefTable)),
    Operation("PUT", "/api/v1/refs", "Move a ref by compare-and-swap.", "write", [REPO, REF], MoveRef,
              answers=ok("Where it points now.", {"type": "object", "required": ["commit"]})),
    Operation("GET", "/api/v1/refs/history", "Who moved which ref when.", "read",
              [REPO, Param("ref", "RefName"), LIMIT], answers=ok("Newest first.", answers.MoveList)),
    Operation("GET", "/api/v1/resolve", "What a revision names.", "read",
              [REPO, Param("rev", "RevisionName", required=True)],
              answers=ok("A commit and its manifest's digest.", answers.Revision)),
    Operation("GET", "/api/v1/access", "Whether pods of a Kubernetes namespace may read a repository.", "read",
              [REPO, Param("namespace", NAMESPACE, required=True)], answers=ok("And why not.", answers.Allowed)),
    Operation("POST", "/api/v1/access", "Whether the pod whose token it is may read a repository.", "read",
              body=PodAsks, answers=ok("And why not, and whose pod it is.", answers.PodAllowed)),
    Operation("GET", "/api/v1/commits", "A revision's history.", "read",
              [REPO, Param("rev", "RevisionName", required=True), LIMIT],
              answers=ok("Newest first.", answers.CommitList)),
    Operation("GET", "/api/v1/usage", "Bytes used: by a repository, by all, or by each (``all=true``).", "list",
              [ANY_REPO, Param("all", "Flag")], answers=ok("Bytes.", {"type": "object"})),
    Operation("GET", "/api/v1/usage/reads", "Who read what.", "list",
              [ANY_REPO, Param("since", TIME), Param("until", TIME), Param("by", "Text")],
              answers=ok("By hours and days.", answers.Reads)),
    Operation("POST", "/api/v1/usage/reads", "Report what was read through a mount.", "read", body=ReadReport,
              answers=ok("Whether it was new.", {"type": "object", "required": ["new"]})),
    Operation("GET", "/api/v1/quotas", "How full quotas are.", "list",
              answers=ok("Limits, use, reservations.", answers.QuotaList)),
    Operation("GET", "/api/v1/priorities", "Classes that were given.", "list",
              answers=ok("By repository and ref.", answers.PriorityList)),
    Operation("PUT", "/api/v1/priorities", "Give a repository or a ref a class.", "govern", body=PutPriority,
              answers=ok("It has it.")),
    Operation("DELETE", "/api/v1/priorities", "Take a class back.", "govern", [REPO, Param("ref", "RefName")],
              answers=ok("It is gone.")),
    Operation("GET", "/api/v1/notices", "What is deprecated or retired.", "read", [REPO],
              answers=ok("Of the repository (an empty commit) and of commits.", answers.NoticeList)),
    Operation("PUT", "/api/v1/notices", "Deprecate or retire.", "govern", body=PutNotice, answers=ok("It is said.")),
    Operation("DELETE", "/api/v1/notices", "Take a notice down.", "govern", [REPO, Param("commit", "CommitId")],
              answers=ok("It is gone.")),
    Operation("GET", "/api/v1/leases", "Who keeps which commit.", "list",
              answers=ok("Every lease that holds.", listing("leases", "holder", "repo", "commit", "expires"))),
]  # fmt: skip
