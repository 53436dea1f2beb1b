"""The mount tree: which names exist, what they mean and which inode they get. No I/O in here."""
