"""Examine a data set before training on it."""

from imgcls.commands.doctor import main

if __name__ == "__main__":
    main()
