"""Prompts that one worker computes and another goes on with (docs/router-disaggregation.md).

The worker that is to answer is chosen first, as ever. Where that one takes blocks from others (``role = "decode"``) and
would have much to compute, a worker with ``role = "prefill"`` computes the prompt before: a request of its own, with
the same id, for one token. What that answers is a description of where the blocks are, opaque to the router, and goes
into the request to the first worker. Whatever fails on the way there, that one computes the prompt itself.
"""
