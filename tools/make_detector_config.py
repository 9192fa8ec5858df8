"""Write the YAML of a detectron2 detector over any network."""

from imgcls.commands.make_detector_config import main

if __name__ == "__main__":
    main()
