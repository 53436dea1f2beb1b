"""How many replicas a model has: policy, forecast, and the share of what there is. No I/O, no clock of its own."""
