"""Xet: files as the Hub's chunked protocol, made from blobs as they are stored (docs/registry-xet.md)."""
