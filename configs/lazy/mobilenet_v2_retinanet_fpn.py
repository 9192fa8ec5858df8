"""RetinaNet over MobileNetV2 as a LazyConfig: detectron2's 1x config but for the trunk, weights and input.

Papers: MobileNetV2, Sandler et al. 2018, arXiv:1801.04381; RetinaNet, Lin et al. 2017, arXiv:1708.02002.
Command: python DETECTRON2/tools/lazyconfig_train_net.py --num-gpus 8 --config-file THIS_FILE
    with detectron2's source in DETECTRON2 and backbone.pth, written by convert_to_detection or import_weights, here.
Hardware: 8 GPUs, as for detectron2's own 1x configs; 16 images per step, 90,000 steps.
published, not reproduced here: no published figure.
"""

from importlib.resources import files

from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig

from imgcls import build_variant

# By its path: importing detectron2.model_zoo needs the pkg_resources that newer setuptools lack.
_stock = LazyConfig.load(str(files("detectron2") / "model_zoo/configs/COCO-Detection/retinanet_R_50_FPN_1x.py"))
model, train, dataloader = _stock.model, _stock.train, _stock.dataloader
optimizer, lr_multiplier = _stock.optimizer, _stock.lr_multiplier

model.backbone.bottom_up = L(build_variant)(
    name="mobilenet_v2_1.0",
    out_features="${..in_features}",
    norm="FrozenBN",
    freeze_at=2,
)
# P6 is made of the trunk's last map, which has 320 channels (2,048 in ResNet-50).
model.backbone.top_block.in_channels = 320

# What the weights were trained with; backbone.yaml beside backbone.pth says the same.
model.input_format = dataloader.train.mapper.image_format = "RGB"
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]

train.init_checkpoint = "backbone.pth"
