"""Draw a demo's training curves and some of its detections: ``python scripts/draw_demo.py output/demo``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from imgcls.data.reading import read_image

SHOWN = 6
SURE = 0.4  # score from which a detection is drawn


def series(folder: Path, key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of ``key`` in a run's metrics.json."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    points = [(line["iteration"], line[key]) for line in lines if key in line]
    return [point[0] for point in points], [point[1] for point in points]


def draw_curves(demo: Path) -> Path:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    axes[0].plot(*series(demo / "classifier", "total_loss"))
    axes[0].set(title="classifier: training loss", xlabel="iteration", yscale="log")
    axes[1].plot(*series(demo / "classifier", "classification/top1"), marker="o")
    axes[1].set(title="classifier: top-1 on held-out digits", xlabel="iteration", ylabel="%")
    for name, label in (("scratch", "random weights"), ("pretrained", "converted backbone")):
        axes[2].plot(*series(demo / name, "total_loss"), label=label)
    axes[2].set(title="detector: training loss", xlabel="iteration", yscale="log")
    axes[2].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    return save(figure, demo / "curves.png")


def draw_detections(demo: Path) -> Path:
    truth = json.loads((demo / "digit_detection/val.json").read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    figure, axes = plt.subplots(2, SHOWN, figsize=(2.2 * SHOWN, 4.9))
    for row, (name, label) in zip(axes, (("scratch", "random weights"), ("pretrained", "converted")), strict=True):
        found = json.loads((demo / name / "inference/coco_instances_results.json").read_text())
        for axis, image in zip(row, truth["images"], strict=False):
            axis.imshow(read_image(str(demo / "digit_detection/val" / image["file_name"])))
            axis.axis("off")
            for box in best_boxes(found, image["id"]):
                draw_box(axis, box, names)
        row[0].set_title(f"from {label}", loc="left")
    return save(figure, demo / "detections.png")


def best_boxes(found: list[dict[str, Any]], image_id: int) -> list[dict[str, Any]]:
    return [box for box in found if box["image_id"] == image_id and box["score"] >= SURE]


def draw_box(axis: Any, box: dict[str, Any], names: dict[int, str]) -> None:
    x, y, width, height = box["bbox"]
    axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="lime", linewidth=1.2))
    label = f"{names[box['category_id']]} {box['score']:.2f}"
    axis.text(x, y - 1, label, color="black", fontsize=7, backgroundcolor="lime", va="bottom")


def save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/draw_demo.py DEMO_FOLDER")
    for picture in (draw_curves(Path(sys.argv[1])), draw_detections(Path(sys.argv[1]))):
        print(picture)
