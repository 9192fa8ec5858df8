"""Train or evaluate a classifier with the plain loop."""

from imgcls.commands.train import main

if __name__ == "__main__":
    main()
