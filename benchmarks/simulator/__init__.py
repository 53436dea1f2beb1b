"""vLLM workers and their clients in virtual time, to compare scheduling policies (benchmarks/router_policies.py)."""
