"""Choose the thresholds of a multi-label checkpoint, one for each class."""

from imgcls.commands.tune_thresholds import main

if __name__ == "__main__":
    main()
