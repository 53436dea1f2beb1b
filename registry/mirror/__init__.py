"""Answering from an upstream Hub what the registry does not hold yet (docs/hub-api.md, "Pull-through")."""
