"""Who may use which model, how much of it, and who waits.

``keys``, ``jwt`` and ``rights`` say who somebody is and what he may do; ``buckets`` and ``redis_buckets`` how much;
``queue`` and ``waking`` who waits for what. ``entry`` is one request's way through all of it, and ``admission`` what
requests share.
"""
