"""The precise prefix index: which worker holds which prefix, from the KV events that vLLM publishes."""
