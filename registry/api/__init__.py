"""The native API (docs/native-api.md), one module for each group of routes."""
