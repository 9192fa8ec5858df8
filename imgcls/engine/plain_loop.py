"""The plain training loop."""

from __future__ import annotations

from typing import Any

from detectron2.utils.events import EventStorage

from imgcls.engine.run import Run


def train(run: Run) -> dict[str, Any]:
    """Train to the end and return the last results; the same steps as ``ClsTrainer`` takes through its hooks."""
    writers = run.writers()
    try:
        with EventStorage(run.start_iter) as storage:
            run.catch_up(writers)
            for iteration, batch in enumerate(run.batches(), start=run.start_iter):
                run.train_on(batch, iteration)
                run.finish_iteration(iteration, writers)
                storage.step()
    finally:
        for writer in writers:
            writer.close()
    return run.results or run.evaluate()
