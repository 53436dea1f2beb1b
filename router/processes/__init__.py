"""One router as several processes: a supervisor, a control process, and one process for each core."""
