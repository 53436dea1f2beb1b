"""``helios worker``: one vLLM of a pod, and the small front beside it (docs/worker.md)."""
