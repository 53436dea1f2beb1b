"""Stands for vLLM where this directory is first in PYTHONPATH."""
