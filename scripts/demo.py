"""The main job from end to end on embedded images: pretrain, prove that the backbone arrives, detect with it.

Runs the same commands as a person would type, prints them, and ends with one table and two pictures.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from imgcls.commands.arguments import one_line_errors

CLASSIFIER = "configs/quick/digits_mobilenet_v1.yaml"
DETECTOR = "configs/quick/digits_retinanet_fpn.yaml"
PLAIN_EPOCHS, ALL_EPOCHS = 19, 20  # the builtin trainer takes over for the last one


class Demo:
    """The steps and their figures; every step is a command in a process of its own."""

    def __init__(self, output: Path, seed: int) -> None:
        self.output, self.seed = output, seed
        self.figures: dict[str, float | str | list[float]] = {}

    def run(self) -> None:
        start = time.monotonic()
        self.classify()
        self.hand_over()
        self.detect()
        self.figures["seconds"] = round(time.monotonic() - start, 1)
        (self.output / "results.json").write_text(json.dumps({"seed": self.seed, **self.figures}, indent=1) + "\n")
        self.draw()
        self.report()

    def classify(self) -> None:
        run = self.output / "classifier"
        common = ("--config-file", CLASSIFIER, "--output", run, "SEED", self.seed)
        say("1. Train MobileNetV1 on 4,000 embedded digits with the plain loop")
        command("tools/train_net.py", *common, "SOLVER.MAX_EPOCHS", PLAIN_EPOCHS)
        say("2. Go on with detectron2's DefaultTrainer: it reads the plain loop's checkpoint")
        text = command("tools/train_net_builtin.py", "--resume", *common, "SOLVER.MAX_EPOCHS", ALL_EPOCHS)
        self.figures["top1"] = metric(text, "classification/top1")
        say("3. Evaluate the builtin trainer's checkpoint with the plain command: the same figure")
        weights = run / "model_final.pth"
        text = command("tools/train_net.py", "--eval-only", *common, "MODEL.WEIGHTS", weights)
        again = metric(text, "classification/top1")
        if again != self.figures["top1"]:
            raise ValueError(f"the two loops disagree about {weights}: {self.figures['top1']} and {again}")

    def hand_over(self) -> None:
        weights, backbone = self.output / "classifier/model_final.pth", self.output / "backbone.pth"
        say("4. Convert the classifier's trunk for a detector")
        command("tools/convert_to_detection.py", "--weights", weights, "--output", backbone)
        say("5. Prove that it arrives: every tensor, and the same features")
        words = ("--weights", backbone, "--classifier", weights, "--config-file", DETECTOR)
        text = command("tools/verify_transfer.py", *words)
        found = re.search(r"OK: (\d+) of (\d+) tensors", text)
        assert found is not None, "verify_transfer passed without saying so"
        self.figures["transfer"] = f"{found[1]} of {found[2]}"
        self.figures["difference"] = max(float(d) for d in re.findall(r"in float\d+: (\S+)", text))

    def detect(self) -> None:
        say("6. Compose the digits on canvases: a detection data set with boxes")
        data = self.output / "digit_detection"
        command("scripts/prepare_digit_detection.py", "--output", data, "--seed", self.seed)
        for number, (name, weights) in enumerate((("scratch", ""), ("pretrained", self.output / "backbone.pth")), 7):
            start = "random weights" if name == "scratch" else "the converted backbone"
            say(f"{number}. Train the digit detector from {start}")
            words = ["--config-file", DETECTOR, "OUTPUT_DIR", self.output / name, "MODEL.WEIGHTS", weights]
            for key, split in (("DATASETS.TRAIN", "train"), ("DATASETS.TEST", "val")):
                words += [key, f"('coco:{data}/{split}.json@{data}/{split}',)"]
            text = command("tools/train_detector.py", *words, "SEED", self.seed)
            self.figures[f"AP_{name}"] = metric(text, "bbox/AP")

    def draw(self) -> None:
        say("9. Draw the curves and some detections")
        command("scripts/draw_demo.py", self.output)

    def report(self) -> None:
        gain = self.figures["AP_pretrained"] - self.figures["AP_scratch"]  # type: ignore[operator]
        rows = [
            ("top-1 on 1,000 held-out digits", f"{self.figures['top1']:.1f} %"),
            ("tensors that arrived bit for bit", self.figures["transfer"]),
            ("largest relative difference of the features", f"{self.figures['difference']:.1e}"),
            ("AP of the detector, random weights", f"{self.figures['AP_scratch']:.1f}"),
            ("AP of the detector, this backbone", f"{self.figures['AP_pretrained']:.1f} (+{gain:.1f})"),
            ("seconds", f"{self.figures['seconds']:.0f}"),
        ]
        width = max(len(name) for name, _ in rows)
        print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows))
        print(f"\npictures: {self.output / 'curves.png'}, {self.output / 'detections.png'}")


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def command(script: str, *words: object) -> str:
    """Run a script of the checkout, showing the command and its last lines; returns its output."""
    print(f"$ python {script} {shlex.join(map(str, words))}", flush=True)
    started = time.monotonic()
    done = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.stderr.write(done.stdout[-2000:] + done.stderr[-2000:])
        raise ValueError(f"{script} ended with exit code {done.returncode}")
    lines = [line for line in done.stdout.strip().splitlines() if line.strip()]
    print("\n".join(f"  {line}" for line in lines[-8:]))
    print(f"  ({time.monotonic() - started:.0f} s)", flush=True)
    return done.stdout


def metric(text: str, name: str) -> float:
    """The figure of the line ``name value``; a detector that finds nothing has an AP of 0, not nan."""
    found = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.M)
    if not found:
        raise ValueError(f"the output does not tell {name}")
    value = float(found[-1])
    return value if value == value else 0.0


def free_folder(wanted: Path) -> Path:
    """``wanted``, or the first of wanted-2, wanted-3, ... that is not there."""
    folder, number = wanted, 2
    while folder.exists():
        folder, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return folder


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="a folder; never overwritten")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    output = free_folder(args.output)
    output.mkdir(parents=True)
    Demo(output, args.seed).run()


if __name__ == "__main__":
    main()
