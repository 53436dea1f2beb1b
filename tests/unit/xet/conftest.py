"""The catalog's fixture for these tests too."""

from tests.unit.registry.conftest import registry as registry
