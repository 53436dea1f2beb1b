"""What runs reconcilers: caches, the queue, leadership, and how what they answer is performed."""
