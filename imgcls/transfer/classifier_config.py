"""The config of a classifier that starts from an imported file, or is evaluated with it."""

from __future__ import annotations

from pathlib import Path

from detectron2.config import get_cfg

from imgcls.config import add_imgcls_config, get_config
from imgcls.config.yaml_writing import as_yaml, changed_from
from imgcls.modeling import family_of
from imgcls.modeling.build import OPTIONS
from imgcls.transfer.handover import Handover

_HEAD = """\
# Classifier {variant} with {weights}, as it was trained to be evaluated. Self-contained.
# Evaluate: python tools/train_net.py --eval-only --config-file {name} DATASETS.TEST "('folder:DIR',)"
# Train on your classes: add --data DIR MODEL.HEAD.RESET True, and a schedule (SOLVER.MAX_EPOCHS, SOLVER.BASE_LR).
"""


def classifier_yaml(handover: Handover, weights: str | Path, name: str | Path) -> str:
    """YAML text, written to ``name``: imgcls' base config with the network, weights and input of ``handover``."""
    architecture, contract = handover.architecture, handover.contract
    keys = {
        "MODEL.WEIGHTS": str(weights),
        "MODEL.BACKBONE.NAME": family_of(architecture.variant).builder,
        "MODEL.BACKBONE.VARIANT": architecture.variant,
        "MODEL.BACKBONE.STEM": architecture.stem,
        "MODEL.BACKBONE.NORM": "GN" if architecture.norm == "GN" else "auto",
        "MODEL.PIXEL_MEAN": list(contract.pixel_mean),
        "MODEL.PIXEL_STD": list(contract.pixel_std),
        "INPUT.TRAIN_SIZE": contract.size,
        "INPUT.TEST_SIZE": contract.size,
        "INPUT.TEST_RESIZE": contract.resize,
        "INPUT.INTERPOLATION": contract.interpolation,
        **{f"MODEL.BACKBONE.{OPTIONS[option]}": value for option, value in architecture.options.items()},
    }
    cfg = get_config("Base-ClsNet.yaml", [word for pair in keys.items() for word in pair])
    tree = changed_from(add_imgcls_config(get_cfg()), cfg)
    return _HEAD.format(variant=architecture.variant, weights=weights, name=name) + as_yaml(tree)
