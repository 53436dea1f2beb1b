"""Choosing a worker: one policy a file, none with I/O or a clock."""
