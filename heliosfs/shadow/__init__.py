"""A part of what users read, compared with a plain download: for a careful roll-out."""
