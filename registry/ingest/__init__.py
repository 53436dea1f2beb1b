"""Ingest: a file's bytes become chunks, and chunks become objects."""

from heliosfs.store.placement import ChunkLocation
from registry.ingest.ingest import Ingest
from registry.ingest.reader import FileSource
from registry.ingest.types import ChunkIndex, IngestedBlob, NewObject, Source

__all__ = ["ChunkIndex", "ChunkLocation", "FileSource", "Ingest", "IngestedBlob", "NewObject", "Source"]
