"""Xet's calls (docs/registry-xet.md)."""

from registry.api.openapi.describe import BYTES, OCTETS, RANGE, Answer, Operation, Param, Table, bytes_of, ok

PLAN = ok("Which chunks of which xorbs make the file.", {"type": "object", "required": ["terms"]}) | {
    416: Answer("The range lies outside.", "", None)
}

OPERATIONS: Table = [
    Operation("GET", "/xet/v1/reconstructions/{file}", "How a file is made.", "grant", [RANGE], answers=PLAN),
    Operation("GET", "/xet/v2/reconstructions/{file}", "The same, in the second form.", "grant", [RANGE], answers=PLAN),
    Operation("GET", "/xet/v1/xorbs/{xorb}", "Bytes of a xorb.", "grant",
              [Param("grant", "Text", required=True), RANGE], answers=bytes_of("The xorb.")),
    Operation("POST", "/xet/v1/telemetry", "What clients tell of themselves: nobody listens.", "nothing",
              answers={204: Answer("Thank you.", "", None)}),
    Operation("POST", "/xet-upload/{spool}/v1/xorbs/default/{xorb}", "Upload a xorb.", "grant", body=BYTES,
              media=OCTETS, answers=ok("It is here.", {"type": "object"})),
    Operation("POST", "/xet-upload/{spool}/v1/shards", "Say how files are made of xorbs.", "grant", body=BYTES,
              media=OCTETS, answers=ok("They are ingested.", {"type": "object"})),
]  # fmt: skip
