"""The router: OpenAI-compatible requests to vLLM workers. docs/router.md describes its behaviour.

``app`` puts it together; ``relay/`` is the path of a request; ``workers``, ``health`` and ``scheduling/`` choose where
it goes. Modules without I/O: ``workers``, ``health``, ``scheduling/``, ``errors``, ``relay/headers``, ``relay/form``,
``relay/fields``.
"""
