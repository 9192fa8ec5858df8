"""Compose handwritten digits into a COCO detection data set; see ``--help``."""

from imgcls.commands.prepare_digits import main

if __name__ == "__main__":
    raise SystemExit(main())
