"""The path of a request: read and checked, sent to a worker, its answer relayed byte for byte."""
