"""What routers and workers say of the load, collected, and served to whoever scales (docs/scaling-signals.md)."""
