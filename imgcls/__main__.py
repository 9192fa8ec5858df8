"""``python -m imgcls COMMAND ...``: the commands of ``tools/`` without a checkout."""

from __future__ import annotations

import difflib
import importlib
import sys
from functools import partial

# name -> (module, keyword arguments of its main, what it does); modules are imported when they are called.
COMMANDS = {
    "train": ("imgcls.commands.train", {}, "train or evaluate a classifier, plain loop"),
    "train-builtin": ("imgcls.commands.train", {"builtin": True}, "the same with detectron2's DefaultTrainer"),
    "convert": ("imgcls.commands.convert", {}, "write a detector's backbone from a classifier's checkpoint"),
    "import-weights": ("imgcls.commands.import_weights", {}, "import weights of torchvision, timm and others"),
    "verify": ("imgcls.commands.verify", {}, "prove that a converted backbone arrives in a detector"),
    "average-checkpoints": ("imgcls.commands.average_checkpoints", {}, "write the mean of several checkpoints"),
    "tune-thresholds": ("imgcls.commands.tune_thresholds", {}, "choose the thresholds of a multi-label network"),
    "make-detector-config": ("imgcls.commands.make_detector_config", {}, "write a detector's YAML over any network"),
    "show-data": ("imgcls.commands.show_data", {}, "draw what the network is fed, with labels"),
    "benchmark-data": ("imgcls.commands.benchmark_data", {}, "measure data loading beside other pipelines"),
    "benchmark-train": ("imgcls.commands.benchmark_train", {}, "measure training beside a bare loop and timm's"),
    "doctor": ("imgcls.commands.doctor", {}, "examine a data set before training on it"),
    "analyze": ("imgcls.commands.analyze", {}, "print what a network costs and offers"),
    "plot-schedule": ("imgcls.commands.plot_schedule", {}, "draw the learning-rate schedule of a config"),
    "plot-run": ("imgcls.commands.plot_run", {}, "draw the curves of one run or of several"),
    "sweep": ("imgcls.commands.sweep", {}, "search a config's best values with many short runs"),
    "train-detector": ("imgcls.commands.train_detector", {}, "train or evaluate a detectron2 detector"),
    "pack-dataset": ("imgcls.commands.pack_dataset", {}, "write a data set as WebDataset tar shards"),
    "prepare-data": ("imgcls.commands.prepare_data", {}, "fetch a known data set, check it and unpack it"),
    "prepare-imagenet": ("imgcls.commands.prepare_imagenet", {}, "build ImageNet's folders from its archives"),
    "prepare-voc": ("imgcls.commands.prepare_voc", {}, "convert Pascal VOC annotations to COCO"),
    "prepare-digits": ("imgcls.commands.prepare_digits", {}, "compose the embedded digits into a detection set"),
}


def main() -> None:
    """Run the command named first; without one, list them."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help", ""):
        print("usage: python -m imgcls COMMAND [options]; COMMAND --help tells more")
        print("\n".join(f"  {command:22}{what}" for command, (_, _, what) in COMMANDS.items()))
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? All: " if near else "allowed: "
        print(f"error: there is no command {name!r}; {hint}{', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    module, options, _ = COMMANDS[name]
    sys.argv = [f"imgcls {name}", *sys.argv[2:]]
    sys.exit(partial(importlib.import_module(module).main, **options)())


if __name__ == "__main__":
    main()
