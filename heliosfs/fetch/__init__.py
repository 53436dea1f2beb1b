"""How a READ gets its bytes: plan, fetch, verify, store."""
