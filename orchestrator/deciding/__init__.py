"""How many workers each service is to have: the scaling policy beside the cluster, for the reconcilers."""
