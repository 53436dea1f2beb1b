"""What a mount is told to do over its control socket, and what it tells of itself."""
