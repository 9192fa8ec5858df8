"""The smallest variant of every family, small: for small images, with the same random weights every time."""

from __future__ import annotations

from dataclasses import replace

import torch
from test_every_variant import SMALLEST

from imgcls.modeling import family_of, make_classifier, make_trunk
from imgcls.transfer.examine import CONTRACT, least_training_size, plain

VARIANTS = list(SMALLEST.values())


def architecture(variant):
    """With position embeddings for 32 pixels where there are some."""
    small = {"pretrain_size": 32} if "pretrain_size" in family_of(variant).options else {}
    return replace(plain(variant), options=small)


def side(variant):
    if "pretrain_size" in family_of(variant).options:
        return 32
    # Inception v3 has nothing left of smaller images before its last stage.
    return 80 if variant == "inception_v3" else max(64, least_training_size(variant))


def trunk_of(variant, *, norm="", **arguments):
    torch.manual_seed(0)
    made = architecture(variant)
    return make_trunk(replace(made, norm=norm) if norm else made, **arguments)


def classifier_of(variant, **arguments):
    torch.manual_seed(0)
    return make_classifier(architecture(variant), 10, CONTRACT, **arguments)


def images(variant, count=2, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, *[side(variant)] * 2), generator=generator, dtype=torch.uint8)


def all_maps(variant, **arguments):
    """Every map that a detector may ask for."""
    names = list(trunk_of(variant, for_detector=True)._out_feature_strides)
    return trunk_of(variant, for_detector=True, out_features=names, **arguments)


def relative(ours, theirs):
    return float((ours.float() - theirs).detach().abs().max() / theirs.detach().abs().max())
