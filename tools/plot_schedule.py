"""Draw the learning-rate schedule of a config."""

from imgcls.commands.plot_schedule import main

if __name__ == "__main__":
    main()
