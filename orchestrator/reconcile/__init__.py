"""What resources become: pure functions from what is seen to what is to be done (docs/operator.md)."""
