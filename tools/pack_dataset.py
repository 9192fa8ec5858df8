"""Write a data set as WebDataset tar shards."""

from imgcls.commands.pack_dataset import main

if __name__ == "__main__":
    raise SystemExit(main())
