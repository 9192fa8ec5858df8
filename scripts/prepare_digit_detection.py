"""Compose handwritten digits into a COCO detection data set; see ``--help``."""

from imgcls.data.digit_canvases import main

if __name__ == "__main__":
    raise SystemExit(main())
