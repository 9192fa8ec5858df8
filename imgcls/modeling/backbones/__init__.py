"""One file per family; importing it registers the family and its builder."""

from imgcls.modeling.backbones import mobilenet_v1, resnet

__all__ = ["mobilenet_v1", "resnet"]
