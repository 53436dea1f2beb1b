"""Spans of requests, exported over OTLP where ``router.tracing`` asks for it; nothing here is loaded elsewhere."""
