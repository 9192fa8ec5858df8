"""Plain data that every level may use; no detectron2 model code."""

from imgcls.structures.batch import Batch
from imgcls.structures.contract import PreprocessingContract
from imgcls.structures.episode import Episode
from imgcls.structures.key_rule import KeyRule
from imgcls.structures.load_report import LoadReport
from imgcls.structures.problem import Problem, first_line
from imgcls.structures.views import Views

__all__ = ["Batch", "Episode", "KeyRule", "LoadReport", "PreprocessingContract", "Problem", "Views", "first_line"]
