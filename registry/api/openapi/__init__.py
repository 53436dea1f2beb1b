"""The registry's OpenAPI document, ``/openapi.json``: one module for each group of calls.

Bodies and answers are described by the very structs that decode them here and in ``helios.registry_client``; the rest
stands in tables. What a table has and the application lacks, or the other way round, shows in the document
(``x-helios-undocumented``, ``x-helios-missing``), and a test fails on it. Imported when somebody asks for it.
"""
