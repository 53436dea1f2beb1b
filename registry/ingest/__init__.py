"""Ingest: a file's bytes become chunks, and chunks become objects."""

from heliosfs.store.placement import ChunkLocation
from registry.ingest.types import ChunkIndex, IngestedBlob, NewObject, Source

__all__ = ["ChunkIndex", "ChunkLocation", "IngestedBlob", "NewObject", "Source"]
