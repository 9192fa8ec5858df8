"""Draw what the network is fed, with labels."""

from imgcls.commands.show_data import main

if __name__ == "__main__":
    main()
