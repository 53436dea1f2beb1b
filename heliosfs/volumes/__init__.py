"""Volumes: one commit of one model each, pinned when it is made, shown under ``/.volumes/<id>``."""
