"""Measure training: the loops beside a bare one and timm's step, and the settings chosen for CPUs."""

from imgcls.commands.benchmark_train import main

if __name__ == "__main__":
    main()
