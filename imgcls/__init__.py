"""imgcls: pretrain classification networks inside detectron2 and hand the backbone to a detector, with proof.

Importing it registers the networks, the pyramids and ``ClsNet`` with detectron2, and the data sets with its catalog.
"""

import warnings

with warnings.catch_warnings():
    # detectron2 scripts two functions at import; torch announces on each of them that scripting will go.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
    import detectron2.modeling  # noqa: F401

__version__ = "0.1.0"

from imgcls import data, engine, modeling, transfer
from imgcls.config import add_imgcls_config, get_config, load_config
from imgcls.engine import ClsTrainer
from imgcls.modeling import ClsNet, build_variant
from imgcls.transfer import load_backbone

__all__ = [
    "ClsNet",
    "ClsTrainer",
    "add_imgcls_config",
    "build_variant",
    "data",
    "engine",
    "get_config",
    "load_backbone",
    "load_config",
    "modeling",
    "transfer",
]
