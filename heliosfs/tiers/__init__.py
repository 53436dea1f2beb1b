"""Where bytes lie on this node: whole and partial blobs on the local disk (L1), single chunks in memory."""
