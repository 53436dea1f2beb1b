"""The catalog's fixture for these tests too."""

from tests.unit.registry.conftest import engine_url as engine_url
from tests.unit.registry.conftest import registry as registry
