"""Measure data loading, stage by stage and beside other pipelines."""

from imgcls.commands.benchmark_data import main

if __name__ == "__main__":
    main()
