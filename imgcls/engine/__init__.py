"""Training: the step, the two loops over it, and what surrounds them."""

from imgcls.engine.output.provenance import describe
from imgcls.engine.plain_loop import train
from imgcls.engine.run import Run
from imgcls.engine.setup import Data, finalize, setup, start_log
from imgcls.engine.step import TrainStep
from imgcls.engine.trainer import ClsTrainer

__all__ = ["ClsTrainer", "Data", "Run", "TrainStep", "describe", "finalize", "setup", "start_log", "train"]
