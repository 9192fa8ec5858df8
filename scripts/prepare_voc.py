"""Convert Pascal VOC annotations to COCO JSON; see ``--help``."""

from imgcls.commands.prepare_voc import main

if __name__ == "__main__":
    raise SystemExit(main())
