"""Train or evaluate a detectron2 detector from a converted backbone."""

from imgcls.commands.train_detector import main

if __name__ == "__main__":
    main()
