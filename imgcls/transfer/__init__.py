"""Handing a trained trunk to a detector, with proof that it arrived."""

from imgcls.transfer.convert import convert, make_handover
from imgcls.transfer.detector_config import detector_fragment
from imgcls.transfer.handover import Handover, read_handover
from imgcls.transfer.load import body_of, contradictions, load_backbone
from imgcls.transfer.verify import Verification, verify

__all__ = [
    "Handover",
    "Verification",
    "body_of",
    "contradictions",
    "convert",
    "detector_fragment",
    "load_backbone",
    "make_handover",
    "read_handover",
    "verify",
]
