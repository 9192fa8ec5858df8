"""Every configuration key that imgcls adds to detectron2's, with its unit and the reason it exists.

Keys live in detectron2's own nodes where one fits. No value of detectron2's is changed here: what pretraining needs
(RGB input, BatchNorm, nothing frozen, ...) stands in ``configs/Base-ClsNet.yaml``, so that a detector which merely
imports imgcls behaves as before.
"""

from detectron2.config import CfgNode

IMAGENET_MEAN_RGB = [123.675, 116.28, 103.53]
IMAGENET_STD_RGB = [58.395, 57.12, 57.375]


def add_imgcls_config(cfg: CfgNode) -> CfgNode:
    """Add imgcls' keys to ``cfg`` (an instance, e.g. ``get_cfg()``), in place, and return it.

    Calling it twice is harmless: keys that are there already keep their values.
    """
    for add in (_add_backbone, _add_head, _add_input, _add_data, _add_solver):
        add(cfg)
    return cfg


def _set_new(node: CfgNode, key: str, value: object) -> None:
    if key not in node:
        setattr(node, key, CfgNode(value) if isinstance(value, dict) else value)


def _add_backbone(cfg: CfgNode) -> None:
    node = cfg.MODEL.BACKBONE
    # Row of the family's table, e.g. "mobilenet_v1_1.0". Unique across families, so the FPN wrapper needs no more.
    _set_new(node, "VARIANT", "")
    # BN | SyncBN | naiveSyncBN | FrozenBN | GN | auto (BN under ClsNet, FrozenBN under any other meta-architecture).
    _set_new(node, "NORM", "auto")
    # standard | small (3x3 stride 1, no pooling: for images of 28 to 64 pixels).
    _set_new(node, "STEM", "standard")
    # Feature maps to return; empty: FPN.IN_FEATURES under an FPN, the last stage under ClsNet, all stages otherwise.
    _set_new(node, "OUT_FEATURES", [])
    # Stochastic depth: probability of leaving out the last block (linear from 0 at the first), where the family has it.
    _set_new(node, "DROP_PATH", 0.0)
    # 32 | 16 | 8: the last stages keep this stride, their convolutions are dilated instead.
    _set_new(node, "OUTPUT_STRIDE", 32)
    # Gradient checkpointing: maps inside a stage are computed again in the backward pass. Less memory, more time.
    _set_new(node, "CHECKPOINT", False)
    # Rows of the sandbox: the network itself, block by block.
    _set_new(node, "ROWS", [])
    # Pixels, side of the images that position embeddings are made for (ViT); 0: the row's own.
    _set_new(node, "PRETRAIN_SIZE", 0)
    # Patches, side of the windows that most blocks of a detector's ViT attend in (ViTDet: 14); 0: the whole map.
    _set_new(node, "WINDOW_SIZE", 0)
    # Relative positions in a detector's ViT, starting from zero (ViTDet has them).
    _set_new(node, "REL_POS", False)
    # Keep maps in channels-last order in memory: faster for depthwise networks on CPUs and with AMP on GPUs.
    _set_new(cfg.MODEL, "CHANNELS_LAST", False)


def _add_head(cfg: CfgNode) -> None:
    _set_new(cfg.MODEL, "HEAD", {})
    head = cfg.MODEL.HEAD
    _set_new(head, "NAME", "auto")  # auto: the head of the network's paper; or a name in HEAD_REGISTRY
    _set_new(head, "NUM_CLASSES", 0)  # 0: counted from the training set
    _set_new(head, "DROPOUT", -1.0)  # probability in [0, 1), before the last linear layer; -1: the paper's
    # Weight of each auxiliary head's loss, for networks that have some (GoogLeNet, Inception v3); 0: without them.
    _set_new(head, "AUX_WEIGHT", 0.3)
    # True: MODEL.WEIGHTS may come without a head or with another number of classes; the head starts at random.
    _set_new(head, "RESET", False)
    _set_new(cfg.MODEL, "LOSS", {})
    _set_new(cfg.MODEL.LOSS, "NAME", "CrossEntropy")  # a name in LOSS_REGISTRY
    _set_new(cfg.MODEL.LOSS, "LABEL_SMOOTHING", 0.0)  # in [0, 1); Szegedy et al. 2016 use 0.1


def _add_input(cfg: CfgNode) -> None:
    node = cfg.INPUT
    _set_new(node, "TRAIN_SIZE", 224)  # pixels, side of the square that the network trains on
    _set_new(node, "TEST_SIZE", 224)  # pixels, side of the centre crop in evaluation
    _set_new(node, "TEST_RESIZE", 256)  # pixels, short side before that crop; 0: resize to TEST_SIZE, no crop
    _set_new(node, "INTERPOLATION", "bilinear")  # nearest | bilinear | bicubic, always antialiased
    # Rows [name, arguments...] of imgcls.data.transforms; the result must be TRAIN_SIZE x TRAIN_SIZE.
    _set_new(node, "TRAIN_TRANSFORMS", [["random_resized_crop", 0.08, 1.0], ["horizontal_flip", 0.5]])


def _add_data(cfg: CfgNode) -> None:
    # Root of the data sets in DATASETS.TRAIN/TEST (--data); empty: a folder of $DETECTRON2_DATASETS, e.g. imagenet.
    _set_new(cfg.DATASETS, "ROOT", "")
    # tensors: collated in the worker (fast). dicts: detectron2's list[dict], for code that wants it.
    _set_new(cfg.DATALOADER, "PACKING", "tensors")
    _set_new(cfg.DATALOADER, "TIMEOUT", 120)  # seconds to wait for a worker before it counts as hung; 0: for ever
    _set_new(cfg.TEST, "IMS_PER_BATCH", 128)  # images per rank and evaluation step
    _set_new(cfg.TEST, "EVAL_EPOCHS", 0.0)  # evaluate every so many epochs; 0: TEST.EVAL_PERIOD (iterations) counts


def _add_solver(cfg: CfgNode) -> None:
    node = cfg.SOLVER
    _set_new(node, "OPTIMIZER", "SGD")  # SGD | AdamW
    _set_new(node, "BETAS", [0.9, 0.999])  # of AdamW
    # Lengths in epochs; 0 (or empty): the key in iterations counts. `SOLVER.MAX_ITER N` on the command line wins.
    _set_new(node, "MAX_EPOCHS", 0.0)  # replaces MAX_ITER
    _set_new(node, "WARMUP_EPOCHS", 0.0)  # replaces WARMUP_ITERS
    _set_new(node, "STEPS_EPOCHS", [])  # replaces STEPS, for the multistep schedule
    _set_new(node, "CHECKPOINT_EPOCHS", 0.0)  # replaces CHECKPOINT_PERIOD
    _set_new(node, "CHECKPOINT_KEEP", 2)  # newest periodic checkpoints to keep, beside the best and the final one
    _set_new(node.AMP, "DTYPE", "float16")  # float16 (with a loss scaler) | bfloat16
    _set_new(node, "LOG_PERIOD", 20)  # iterations between two lines of progress
