"""Jobs and policy: pulls, replication, mirror, garbage, verification, quarantine."""

from helios import registry_answers as answers
from registry.api.admission import Release
from registry.api.openapi.describe import ANY_REPO, EVENTS, REPO, Answer, Operation, Param, Table, ok
from registry.gc.routes import Collect, Compress, Lease, RemoveDomain, Verify
from registry.levels.routes import Wanted
from registry.mirror.routes import Approve, Detach
from registry.pull.routes import PullRequest
from registry.transfer.routes import StartReplication

EVENT = {"type": "string", "description": "Lines of JSON; the last one's event is done or error."}

OPERATIONS: Table = [
    Operation("POST", "/api/v1/pulls", "Bring a repository from the upstream.", "admin", body=PullRequest,
              answers=ok("What happens, as it happens.", EVENT, EVENTS)),
    Operation("POST", "/api/v1/replications", "Bring a peer's repositories.", "admin", body=StartReplication,
              answers=ok("What happens, as it happens.", EVENT, EVENTS)),
    Operation("POST", "/api/v1/gc", "Collect garbage.", "admin", body=Collect,
              answers=ok("What happens, as it happens.", EVENT, EVENTS)),
    Operation("POST", "/api/v1/verify", "Look at what is stored.", "admin", body=Verify,
              answers=ok("What happens, as it happens.", EVENT, EVENTS)),
    Operation("GET", "/api/v1/domains", "Domains, what they hold and whose they are.", "admin",
              answers=ok("All of them.", answers.DomainList)),
    Operation("POST", "/api/v1/domains/remove", "Remove a domain that nobody is in.", "admin", body=RemoveDomain,
              answers=ok("What happens, as it happens.", EVENT, EVENTS)),
    Operation("POST", "/api/v1/compress", "Compress what nobody has read for a while.", "admin", body=Compress,
              answers=ok("What happens, as it happens.", EVENT, EVENTS)),
    Operation("PUT", "/api/v1/leases", "Keep a commit for a while.", "read", body=Lease,
              answers=ok("Until when, in unix seconds.", {"type": "object", "required": ["expires"]})),
    Operation("GET", "/api/v1/mirror", "Upstream refs that are followed.", "list",
              answers=ok("With their policies.", answers.FollowedList)),
    Operation("POST", "/api/v1/mirror/approve", "Let a followed ref move.", "admin", body=Approve,
              answers=ok("Where it points now.", {"type": "object", "required": ["repo", "ref", "commit"]})),
    Operation("POST", "/api/v1/mirror/detach", "Make a followed ref one's own.", "admin", body=Detach,
              answers=ok("It is for pushes now.", {"type": "object", "required": ["repo", "ref"]})),
    Operation("GET", "/api/v1/where", "At which level models are.", "list",
              params=[ANY_REPO, Param("rev", "RevisionName")],
              answers=ok("Of one revision, or of all models.", {"type": "object", "anyOf": [
                  {"required": ["repo", "rev", "state", "commit", "bytes", "held", "levels", "reason", "fetch"]},
                  {"required": ["models"]}]})),
    Operation("POST", "/api/v1/where", "Have a revision brought from the upstream, without waiting.", "admin",
              body=Wanted, answers={
                  200: Answer("Where it is; nothing is under way.", holds=answers.Place),
                  202: Answer("It is being fetched; Retry-After says when to ask again.", holds=answers.Place)}),
    Operation("GET", "/api/v1/fetches", "What this process fetches in the background, for the others.", "grant",
              [REPO, Param("rev", "RevisionName", required=True)], answers=ok("How far it is.", answers.Fetch)),
    Operation("POST", "/api/v1/fetches", "Have this process fetch a revision, for the others.", "grant",
              [REPO, Param("rev", "RevisionName", required=True)], answers=ok("How far it is.", answers.Fetch)),
    Operation("POST", "/api/v1/quarantine/release", "Let a file go that is kept back.", "admin", body=Release,
              answers=ok("It can be read.")),
]  # fmt: skip
