"""Print what a network costs and offers."""

from imgcls.commands.analyze import main

if __name__ == "__main__":
    main()
