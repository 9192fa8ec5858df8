"""Train or evaluate a classifier with detectron2's DefaultTrainer."""

from imgcls.commands.train import main

if __name__ == "__main__":
    main(builtin=True)
