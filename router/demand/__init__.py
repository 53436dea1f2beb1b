"""What there is to do for each model, and what is being done: for whoever scales (docs/scaling-signals.md).

Each process that relays says what it has counted (``sayer``), the control process sums it (``book``), puts what it
knows of the workers beside it (``shown``), and the administration answers with that, or streams who waits (``watch``).
"""
