"""Who reads which model when (docs/registry-usage.md)."""
