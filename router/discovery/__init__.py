"""Where workers come from: a file, Kubernetes, and workers that register; and what models the registry can get.

Each source tells the whole set that it knows, whenever it has changed, to an ``Apply``. A source that can't be reached
tells nothing: what it said last stays.
"""
