"""Prove that a converted backbone arrives in a detector."""

from imgcls.commands.verify import main

if __name__ == "__main__":
    main()
