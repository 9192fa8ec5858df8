"""Fetch a known data set, check it, unpack it and count it; see ``--help``."""

from imgcls.commands.prepare_data import main

if __name__ == "__main__":
    raise SystemExit(main())
