"""What keeps one bad worker from being everybody's trouble: cores without I/O, and the adapters around them."""
