"""What the registry knows, in SQL: chunks, objects, blobs, repositories, commits, refs and their history."""
