"""Search a config's best values with many short runs."""

from imgcls.commands.sweep import main

if __name__ == "__main__":
    main()
