"""Write a detector's backbone from a classifier's checkpoint."""

from imgcls.commands.convert import main

if __name__ == "__main__":
    main()
