"""Does accuracy suffer from the settings chosen for the CPU? Trains a config with and without them, over several seeds.

python scripts/cpu_settings_accuracy.py --config-file configs/quick/digits_classic_cnn.yaml --output output/accuracy
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = ("off", "auto")


def main() -> None:
    """Print a row for each setting: the figure of each seed, their mean, and the time of training."""
    parser = argparse.ArgumentParser(description="Compare accuracy with and without the settings for the CPU.")
    parser.add_argument(
        "--config-file", nargs="+", required=True, metavar="FILE", help="a classifier's YAML, or several"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="for the runs; must not be there yet")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--metric", default="top1", help="of the last evaluation")
    args = parser.parse_args()
    print(f"{' '.join(args.config_file)}: {args.metric} by seed")
    print(f"{'SOLVER.CPU_SETTINGS':20}" + "".join(f"{seed:>8}" for seed in range(args.seeds)) + "    mean   minutes")
    for setting in SETTINGS:
        start = time.perf_counter()
        found = [trained(args.config_file, setting, seed, Path(args.output), args.metric) for seed in range(args.seeds)]
        figures = "".join(f"{value:8.2f}" for value in found)
        minutes = (time.perf_counter() - start) / 60
        print(f"{setting:20}{figures}{statistics.mean(found):8.2f}{minutes:10.1f}", flush=True)


def trained(configs: list[str], setting: str, seed: int, folder: Path, metric: str) -> float:
    """The figure that a training ends with."""
    output = folder / f"{setting}_{seed}"
    tool = Path(__file__).resolve().parents[1] / "tools/train_net.py"
    words = [tool, "--config-file", *configs, "--output", output, "SOLVER.CPU_SETTINGS", setting, "SEED", seed]
    # What the file expects was measured with one of the two settings.
    done = subprocess.run(
        [sys.executable, *map(str, words), "TEST.EXPECTED_RESULTS", "[]"], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    last = (output / "metrics.json").read_text().splitlines()[-1]
    return float(json.loads(last)[f"classification/{metric}"])


if __name__ == "__main__":
    main()
