"""Bringing repositories from an upstream Hub into the registry (docs/hub-api.md)."""
