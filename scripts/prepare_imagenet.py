"""Build ImageNet's class folders from the official archives; see ``--help``."""

from imgcls.commands.prepare_imagenet import main

if __name__ == "__main__":
    raise SystemExit(main())
