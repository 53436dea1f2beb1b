"""OpenAI's files and batches: many requests in a file, answered at low priority within a day (docs/router-batches.md).

api_files, api_batches -> shelf -> objects        what clients see, over records in one store that all routers share
runner -> run -> slots, asking -> the relay       whose turn it is, and one batch from its input to its output
machine, progress, lines, records                 the cores: no I/O, and the time is given
"""
