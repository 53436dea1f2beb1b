"""Garbage collection, verification and repair of what the registry stores (docs/registry-gc.md)."""
