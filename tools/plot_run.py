"""Draw the curves of one run or of several."""

from imgcls.commands.plot_run import main

if __name__ == "__main__":
    main()
