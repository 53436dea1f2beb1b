"""``python -m helios``: the ``helios`` command, also where its script is not on PATH."""

from helios.cli.main import main

if __name__ == "__main__":
    main()
