"""Import weights of another library."""

from imgcls.commands.import_weights import main

if __name__ == "__main__":
    main()
