"""The catalog's fixtures for these tests too."""

from tests.unit.registry.conftest import *  # noqa: F403
