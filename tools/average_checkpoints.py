"""Write the mean of several checkpoints of one network."""

from imgcls.commands.average_checkpoints import main

if __name__ == "__main__":
    main()
