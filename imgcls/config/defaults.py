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
    # torch.compile for trunk and head: default, reduce-overhead or max-autotune (its modes), aot_eager; empty: none.
    _set_new(cfg.MODEL, "COMPILE", "")


def _add_head(cfg: CfgNode) -> None:
    _set_new(cfg.MODEL, "HEAD", {})
    head = cfg.MODEL.HEAD
    _set_new(head, "NAME", "auto")  # auto: the head of the network's paper; or a name in HEAD_REGISTRY
    _set_new(head, "NUM_CLASSES", 0)  # 0: counted from the training set
    _set_new(head, "DROPOUT", -1.0)  # probability in [0, 1), before the last linear layer; -1: the paper's
    # Weight of each auxiliary head's loss, for networks that have some (GoogLeNet, Inception v3); 0: without them.
    _set_new(head, "AUX_WEIGHT", 0.3)
    # Several classes a picture, or none: scores go through a sigmoid each. Set from the data; no need to state it.
    _set_new(head, "MULTI_LABEL", False)
    # True: MODEL.WEIGHTS may come without a head or with another number of classes; the head starts at random.
    _set_new(head, "RESET", False)
    _set_new(cfg.MODEL, "LOSS", {})
    _set_new(cfg.MODEL.LOSS, "NAME", "CrossEntropy")  # a name in LOSS_REGISTRY
    loss = cfg.MODEL.LOSS
    _set_new(loss, "LABEL_SMOOTHING", 0.0)  # of CrossEntropy and BCE, in [0, 1); Szegedy et al. 2016 use 0.1
    # Factors, one a class, so that rare classes count; []: none; ["balanced"]: computed from the training set.
    _set_new(loss, "CLASS_WEIGHTS", [])  # of CrossEntropy and SoftmaxFocal: factor of the pictures of a class
    _set_new(loss, "POS_WEIGHTS", [])  # of BCE: factor of a class where it is there, relative to where it is not
    # Of BCE, in [0, 1): a class with more than this share of a mixed picture counts as there; 0: shares stay shares.
    _set_new(loss, "TARGET_THRESHOLD", 0.0)
    _set_new(loss, "GAMMA", 2.0)  # of the focal losses: exponent that quiets what is easy (Lin et al. 2017: 2)
    _set_new(loss, "ALPHA", 0.25)  # of SigmoidFocal: weight in [0, 1) of classes that are there; -1: none
    # Of Asymmetric; the values are those of Ridnik et al. 2021.
    _set_new(loss, "GAMMA_POS", 0.0)  # exponent where a class is there
    _set_new(loss, "GAMMA_NEG", 4.0)  # exponent where it is not
    _set_new(loss, "CLIP", 0.05)  # probability in [0, 1) up to which a class that is not there costs nothing
    _set_new(cfg.MODEL, "DISTILL", {})
    teacher = cfg.MODEL.DISTILL
    # A trained network to learn from: a classifier's checkpoint, a hand-over file with its head, or "timm:<name>".
    _set_new(teacher, "TEACHER", "")
    _set_new(teacher, "WEIGHTS", "")  # file with the weights of a "timm:<name>"; empty: those that timm fetches
    # Of a teacher that does not say its classes: a text file, one name a line, or in_order (that of the training set).
    _set_new(teacher, "CLASSES", "")
    _set_new(teacher, "HEAD", "auto")  # the MODEL.HEAD.NAME that the teacher was trained with
    _set_new(teacher, "SIZE", 0)  # pixels, side that the teacher sees the images at; 0: that of the student's
    _set_new(teacher, "KIND", "soft")  # soft: its probabilities (Hinton et al. 2015). hard: its choice (DeiT)
    _set_new(teacher, "ALPHA", 0.5)  # share of the teacher in the loss, 0..1; the labels' is the rest
    _set_new(teacher, "TEMPERATURE", 1.0)  # of soft: both networks' logits are divided by it, > 0


def _add_input(cfg: CfgNode) -> None:
    node = cfg.INPUT
    _set_new(node, "TRAIN_SIZE", 224)  # pixels, side of the square that the network trains on
    _set_new(node, "TEST_SIZE", 224)  # pixels, side of the centre crop in evaluation
    _set_new(node, "TEST_RESIZE", 256)  # pixels, short side before that crop; 0: resize to TEST_SIZE, no crop
    _set_new(node, "INTERPOLATION", "bilinear")  # nearest | bilinear | bicubic, always antialiased
    # fast: of a JPEG only what is cut out is decoded, large ones at 1/2, 1/4 or 1/8. exact: all of it, by Pillow.
    _set_new(node, "TRAIN_DECODE", "fast")
    _set_new(node, "TEST_DECODE", "exact")  # the same in evaluation
    # Rows [name, arguments...] or ["policy", name] (docs/augmentation.md); the result must be TRAIN_SIZE x TRAIN_SIZE.
    _set_new(node, "TRAIN_TRANSFORMS", [["random_resized_crop", 0.08, 1.0], ["horizontal_flip", 0.5]])
    _set_new(node, "MIXUP_ALPHA", 0.0)  # pairs of a batch blended, shares from Beta(alpha, alpha); 0: off; usual 0.1-1
    _set_new(node, "CUTMIX_ALPHA", 0.0)  # boxes of one put into another, areas from Beta(alpha, alpha); 0: off; usual 1
    _set_new(node, "MIX_PROB", 1.0)  # probability, 0..1, that a batch is mixed
    _set_new(node, "MIX_SWITCH_PROB", 0.5)  # share, 0..1, of the mixed batches that get CutMix, when both are on
    # Progressive image size: rows [epoch, side in pixels], from that epoch on, epochs rising; empty: TRAIN_SIZE always.
    _set_new(node, "TRAIN_SIZE_STEPS", [])
    # Several views of each picture, for self-supervision: rows [count, side in pixels, rows or the name of a policy].
    _set_new(node, "VIEWS", [])
    _set_new(node, "MAX_PIXELS", 64_000_000)  # of a picture, at most: reading takes 8 to 17 bytes of memory for each


def _add_data(cfg: CfgNode) -> None:
    # Root of the data sets in DATASETS.TRAIN/TEST (--data); empty: a folder of $DETECTRON2_DATASETS, e.g. imagenet.
    _set_new(cfg.DATASETS, "ROOT", "")
    _set_new(cfg.DATASETS, "HOLD_OUT", 0.1)  # share of each class that NAME#val takes of a set without a split, 0..1
    _set_new(cfg.DATASETS, "SPLIT_SEED", 0)  # which of the possible splits NAME#train and NAME#val are
    # tensors: collated in the worker (fast). dicts: detectron2's list[dict], for code that wants it.
    _set_new(cfg.DATALOADER, "PACKING", "tensors")
    _set_new(cfg.DATALOADER, "TIMEOUT", 50)  # seconds to wait for a worker before it counts as hung; 0: for ever
    # raise: a file that cannot be read ends the run. skip: in training another takes its place, evaluation counts it.
    _set_new(cfg.DATALOADER, "ON_ERROR", "raise")
    _set_new(cfg.DATALOADER, "MAX_BAD_SHARE", 0.1)  # of a set's files, 0..1: with more bad ones than that skip ends too
    # shuffle | balanced (every class equally often) | weighted (by the set's own weights); both with replacement.
    _set_new(cfg.DATALOADER, "SAMPLING", "shuffle")
    # Shards of a packed set that are mixed at a time, for storage that is slow to jump about in; 0: read at random.
    _set_new(cfg.DATALOADER, "SHUFFLE_BLOCK", 0)
    # File that gets a JSON line an iteration, with the indices of the samples that each rank trained on; empty: none.
    _set_new(cfg.DATALOADER, "TRACE", "")
    _set_new(cfg.DATALOADER, "REPEATS", 1)  # draws of each image in a row (repeated augmentation: 3)
    _set_new(cfg.TEST, "IMS_PER_BATCH", 128)  # images per rank and evaluation step
    # Figure that chooses model_best.pth; auto: top1, with several labels a picture mAP.
    _set_new(cfg.TEST, "METRIC", "auto")
    _set_new(cfg.TEST, "EVAL_EPOCHS", 0.0)  # evaluate every so many epochs; 0: TEST.EVAL_PERIOD (iterations) counts


def _add_solver(cfg: CfgNode) -> None:
    node = cfg.SOLVER
    _set_new(node, "OPTIMIZER", "SGD")  # a name of imgcls.solver.optimizers
    _set_new(node, "BETAS", [0.9, 0.999])  # of Adam and its kind
    _set_new(node, "SQUARE_DECAY", 0.9)  # of RMSprop's average of squares
    _set_new(node, "EPS", 0.0)  # of an optimizer that has one; 0: its library's default
    _set_new(node, "LAYER_DECAY", 1.0)  # factor on the rate from one block of the backbone to the one before it
    _set_new(node, "PARAM_OVERRIDES", [])  # rows [pattern of parameter names, {lr_factor: ..., weight_decay: ...}]
    # Rows [pattern of parameter or module names, epoch up to which they are frozen; 0: for ever]; the last match wins.
    _set_new(node, "FREEZE", [])
    _set_new(node, "LR_FOR_BATCH", 0)  # images a step that BASE_LR is meant for: it is scaled to IMS_PER_BATCH; 0: not
    _set_new(node, "LR_SCALING", "linear")  # linear | sqrt, for LR_FOR_BATCH
    # Lengths in epochs; 0 (or empty): the key in iterations counts. `SOLVER.MAX_ITER N` on the command line wins.
    _set_new(node, "MAX_EPOCHS", 0.0)  # replaces MAX_ITER
    _set_new(node, "WARMUP_EPOCHS", 0.0)  # replaces WARMUP_ITERS
    _set_new(node, "STEPS_EPOCHS", [])  # replaces STEPS, for the multistep schedule
    _set_new(node, "CHECKPOINT_EPOCHS", 0.0)  # replaces CHECKPOINT_PERIOD
    _set_new(node, "DECAY_EPOCHS", 0.0)  # replaces DECAY_ITERS
    _set_new(node, "DECAY_ITERS", 1)  # iterations for one factor SOLVER.GAMMA, of WarmupStepLR and WarmupExponentialLR
    _set_new(node, "POLYNOMIAL_POWER", 1.0)  # of WarmupPolynomialLR: (1 - progress) to this power
    _set_new(node, "RESTART_CYCLES", 4)  # of WarmupCosineRestartsLR, in the whole run
    _set_new(node, "RESTART_GROWTH", 2.0)  # each of these cycles is so many times as long as the one before
    _set_new(node, "PLATEAU_PATIENCE", 2)  # of PlateauLR: evaluations without a better TEST.METRIC before GAMMA
    _set_new(node, "EARLY_STOP", {})
    _set_new(node.EARLY_STOP, "PATIENCE", 0)  # evaluations without a better TEST.METRIC that end the run; 0: it goes on
    _set_new(node.EARLY_STOP, "MIN_DELTA", 0.0)  # better means by more than this, in the figure's unit (top1: %)
    _set_new(node, "CHECKPOINT_KEEP", 2)  # newest periodic checkpoints to keep, beside the best and the final one
    # auto: on CPUs AMP in bfloat16 and CHANNELS_LAST where a rule finds them faster; off: as stated; decided: was done.
    _set_new(node, "CPU_SETTINGS", "auto")
    # Iterations from one checkpoint that stays for good to the next, each of them saved; 0: none does.
    _set_new(node, "CHECKPOINT_KEEP_EVERY", 0)
    _set_new(node, "CHECKPOINT_KEEP_EVERY_EPOCHS", 0.0)  # replaces CHECKPOINT_KEEP_EVERY
    # GPUs multiply float32 in TF32: 10 bits of mantissa for 23, several times as fast. False: exactly.
    _set_new(node, "TF32", False)
    # ddp: every rank holds everything. fsdp2: weights, gradients and optimizer state are cut up over the ranks.
    _set_new(node, "PARALLEL", "ddp")
    _set_new(node.AMP, "DTYPE", "float16")  # float16 (with a loss scaler) | bfloat16
    _set_new(node, "ACCUMULATE", 1)  # micro-batches that a rank's share of a step is cut into: less memory, same batch
    _set_new(node, "EMA", {})
    # Keep a moving average of the weights, which is evaluated and handed over in their place.
    _set_new(node.EMA, "ENABLED", False)
    _set_new(node.EMA, "DECAY", 0.9999)  # share of the average that one step keeps, in [0, 1)
    _set_new(node.EMA, "WARMUP", True)  # keep less at first: (1 + step) / (10 + step)
    _set_new(node, "SWA", {})
    # Average the weights of the end of training in equal shares; evaluated and handed over in their place.
    _set_new(node.SWA, "ENABLED", False)
    _set_new(node.SWA, "START", 0.75)  # share of the run, 0..1, that is done before averaging begins
    _set_new(node.SWA, "PERIOD_EPOCHS", 1.0)  # replaces PERIOD
    _set_new(node.SWA, "PERIOD", 1)  # iterations from one set of weights that is taken in to the next
    _set_new(node.SWA, "LR", 0.0)  # rate from START on, in place of the schedule's; 0: the schedule goes on
    _set_new(node.SWA, "ANNEAL", 0.0)  # share of the run, 0..1, over which the rate goes over to LR; 0: at once
    # A loss or gradient that is no finite number. stop: end the run. skip: leave the step out, up to NON_FINITE_MOST.
    _set_new(node, "NON_FINITE", "stop")
    _set_new(node, "NON_FINITE_MOST", 10)  # steps left out before the run ends all the same
    _set_new(node, "LOG_PERIOD", 20)  # iterations between two lines of progress
    _set_new(node, "WRITERS", ["tensorboard"])  # beside metrics.json: tensorboard, mlflow, wandb, or none
