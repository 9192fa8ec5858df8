"""Handing a trained trunk to a detector, with proof that it arrived."""

from imgcls.transfer import path_handlers
from imgcls.transfer.convert import convert, make_handover
from imgcls.transfer.detector_config import detector_fragment, detector_yaml
from imgcls.transfer.handover import Handover, read_handover
from imgcls.transfer.import_weights import import_weights, write_import
from imgcls.transfer.load import body_of, contradictions, load_backbone
from imgcls.transfer.verify import Verification, verify

__all__ = [
    "Handover",
    "Verification",
    "body_of",
    "contradictions",
    "convert",
    "detector_fragment",
    "detector_yaml",
    "import_weights",
    "load_backbone",
    "make_handover",
    "path_handlers",
    "read_handover",
    "verify",
    "write_import",
]
