"""The router: OpenAI-compatible requests to vLLM workers. docs/router.md describes its behaviour.

``app`` puts it together; ``relay/`` is the path of a request; ``workers`` (of ``membership`` and ``worker``),
``health`` and ``scheduling/`` choose where it goes; ``checks`` and ``scraper`` ask the workers. Modules without I/O:
``workers``, ``membership``, ``worker``, ``worker_metrics``, ``latency``, ``health``, ``scheduling/``, ``errors``,
``relay/headers``, ``relay/form``, ``relay/fields``.
"""
