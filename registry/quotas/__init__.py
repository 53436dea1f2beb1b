"""Quotas of namespaces: what may be stored, reserved before it comes (docs/registry-quotas.md)."""
