"""Choosing a worker: filters, then weighted scorers, then a picker; one algorithm a file, none with I/O.

``policy`` says what these are and runs them, ``configured`` makes them from the configuration.
"""
