"""gRPC: the statuses of our errors, and health checks."""
