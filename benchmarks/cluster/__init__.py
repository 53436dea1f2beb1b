"""A cluster in virtual time: models, their requests, nodes with GPUs and caches; what scales them is given."""
