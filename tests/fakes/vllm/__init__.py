"""A verifying fake of vLLM's HTTP server.

It answers vLLM's routes in vLLM's shapes (held to ``golden.json``, captured from real vLLM 0.32), with tokens that
follow from the prompt alone, and it checks what it is told: headers a proxy must not forward, bodies vLLM would
refuse, paths that users must never reach, KV-transfer parameters that did not come from a prefill worker. What it
finds is in its journal, which a test reads through the control API on a second port, where faults are ordered too.

- ``python -m tests.fakes.vllm --model M --port N`` runs it as a process; ``fixtures.fake_vllm`` in a thread.
- ``Settings`` says what it serves; ``client.Control`` is the client of the control API.

Not simulated: sampling (``temperature``, ``stop``, ``logprobs`` and the like change nothing), tools, images, LoRA.
"""
