"""Chaos for the router: workers that fail on command, clients that check every byte, and a verdict on every failure.

``answers`` says what each request is answered, so that a client knows it beforehand; ``board`` is what workers and the
one who orders faults share; ``nursery`` runs the workers, ``fleet`` commands them and tells the router of them,
``load`` are the clients, ``verdict`` tells what had to fail from what was lost, ``leaks`` what is left over, and
``scenario`` puts it together. ``python -m tests.support.chaos --minutes 5`` is the long run.
"""
