"""The default configuration: every key with a comment, from which docs/config.md is made."""

from __future__ import annotations

from fvcore.common.config import CfgNode as Node

_C = Node()

# Folder of the run: weights, logs, metrics.json and pictures. "auto" means output/<name of the config file>.
_C.OUTPUT_DIR = "auto"
# Seed of every random number in the run.
_C.SEED = 0
# Threads that PyTorch uses on the CPU; 0 leaves its own choice.
_C.THREADS = 0
# "auto" takes CUDA where there is one, else the CPU; or any device name that PyTorch knows.
_C.DEVICE = "auto"

# ---- data -------------------------------------------------------------------------------------------------
_C.DATA = Node()
# Root of the data sets. Empty: the environment variable EARLYEXIT_SSD_DATASETS, else ./datasets.
_C.DATA.ROOT = ""
# Your own sets, a triple each, paths relative to the root: (name, COCO JSON file, photo folder),
# (name, folder of VOC XML files, photo folder), (name, VOC devkit folder such as VOC2012, split), (name, data.yaml of
# YOLO data, split) or, for photos without boxes (LOSS.SUPERVISION teacher), (name, "", photo folder).
_C.DATA.DATASETS = ()
# Fetch voc_2007_* and voc_2012_* with torchvision when they are missing (needs a network).
_C.DATA.DOWNLOAD = False
# Data sets that teach, by name: of DATA.DATASETS or of the catalog, one or several concatenated.
_C.DATA.TRAIN = ("synthetic_chairs_train",)
# Data sets that the gates look at and that routing is calibrated on; none of TRAIN. Photos like those to come.
_C.DATA.CALIB = ("synthetic_chairs_calib",)
# Data sets for the report; none of TRAIN or CALIB. Nothing is chosen or stopped by them.
_C.DATA.TEST = ("synthetic_chairs_test",)
# Class names to detect, in the order of the labels 1..K. Empty: every class of the training set.
_C.DATA.CLASSES = ()
# What to do with a record that is broken: repair (counted warning), refuse (stop, one line) or skip.
_C.DATA.ON_BAD = "repair"
# Take photos that an annotation file names outside its photo folder (absolute names, ../), and YOLO data outside the
# folder of data.yaml. By default they are broken records.
_C.DATA.ALLOW_OUTSIDE = False
# Largest share of training photos without any wanted object, in [0, 1): a seeded choice of them is left out. -1 keeps
# them as they come.
_C.DATA.NEGATIVE_SHARE = -1.0
# Class-balanced sampling: photos with a class that fewer than this share of the training photos show are shown more
# often, sqrt(this / its share) times (Gupta et al. 2019, LVIS). 0 shows every photo once.
_C.DATA.REPEAT_THRESHOLD = 0.0
# Use only N photos of each split, a seeded choice; 0 uses all. For trials.
_C.DATA.LIMIT = 0
# Training augmentation: ssdlite (IoU-aware crop, flip), ssd (adds colour and zoom-out), flip, none.
_C.DATA.AUGMENTATION = "ssdlite"
# Worker processes of the loaders; 0 loads in the main process.
_C.DATA.WORKERS = 2
# The rendered data set of indoor scenes, made below DATA.ROOT when a synthetic_* name is used and it is missing or was
# made with other settings.
_C.DATA.SYNTHETIC = Node()
# Photos per split: train, calib, test.
_C.DATA.SYNTHETIC.SIZES = (1600, 200, 300)
# Side of the rendered photos, pixels.
_C.DATA.SYNTHETIC.IMAGE_SIZE = 192
# Seed of the renderer.
_C.DATA.SYNTHETIC.SEED = 0

# ---- model ------------------------------------------------------------------------------------------------
_C.MODEL = Node()
# The detector under the exits, by torchvision's name: ssdlite320_mobilenet_v3_large, or ssd300_vgg16 (with IMAGE_SIZE
# 300, EXITS.BRANCH light, and for ImageNet weights WEIGHTS_BACKBONE IMAGENET1K_FEATURES).
_C.MODEL.NAME = "ssdlite320_mobilenet_v3_large"
# Side of the square network input, pixels.
_C.MODEL.IMAGE_SIZE = 320
# Width multiplier of the MobileNetV3-Large trunk (and of the extra layers behind it).
_C.MODEL.WIDTH = 1.0
# Checkpoint to retrofit: a path, also of what torchvision's reference training wrote, or a name of torchvision's
# SSDLite320_MobileNet_V3_Large_Weights (COCO_V1).
_C.MODEL.WEIGHTS = ""
# Names of the checkpoint's classes, when it is a path: "coco" (91 outputs), or "" where they are this run's own.
_C.MODEL.WEIGHTS_CLASSES = ""
# How a checkpoint with more classes becomes a smaller head. "exact" keeps its rows and folds the unwanted ones
# into background by log-sum-exp: same scores as before. "compact" does so with the few that compete with the wanted
# ones, found on photos of DATA.TRAIN without their boxes, and drops the others: far cheaper, almost the same scores.
# "rows" keeps the wanted rows and background only: cheapest, and some scores are too high.
_C.MODEL.FOLD = "exact"
# "compact" keeps as few competing classes as it takes for a wanted class's score to differ by at most this from the
# whole head's, on average over the default boxes where "rows" would find something (a score of 0.05). 0 keeps all.
_C.MODEL.COMPACT_TOLERANCE = 0.0015
# ImageNet weights of the trunk when MODEL.WEIGHTS is empty: a name of MobileNet_V3_Large_Weights, or "".
_C.MODEL.WEIGHTS_BACKBONE = ""
# Post-processing, as in torchvision's SSD: detections of a lower score are dropped.
_C.MODEL.SCORE_THRESH = 0.001
# IoU above which the weaker of two detections of a class is dropped (non-maximum suppression).
_C.MODEL.NMS_THRESH = 0.55
# Detections kept per image.
_C.MODEL.DETECTIONS_PER_IMG = 300
# Candidates per class that enter the suppression.
_C.MODEL.TOPK_CANDIDATES = 300

# ---- exits ------------------------------------------------------------------------------------------------
_C.EXITS = Node()
# Trunk layers behind which a branch leaves, increasing, 1 to 15 (torchvision's numbering, the stem is 0).
_C.EXITS.LAYERS = (8, 12)
# Channels of a branch's first map; the others are as wide as the full path's. 0: as many as there are in the copy of
# the full path's own first map, and its predictors with it (behind layers 13 to 15, where there is nothing to copy, a
# new map and new predictors). Of a light branch, the channels of every map; 0: 64.
_C.EXITS.CHANNELS = 0
# Looks at a small copy of the photo before the network runs: [pixels, layer] of each, such as [[128, 12]]. The same
# trunk sees the copy, and a policy that looks at the trunk (foreseen_emptiness) decides whether there is anything to
# find. Glances come before LAYERS, in THRESHOLDS and TEMPERATURES too; LAYERS may be [] then.
_C.EXITS.GLANCES = ()
# Kind of the branches, one for all exits or one for each: copied (copies of the full path's own layers), light (few
# layers of its own: attention on the tap, context from the exit before, a narrow pyramid) or a kind of yours.
_C.EXITS.BRANCH = ("copied",)
# Whether a light branch looks at what the exit before has seen (a cascade), where that is light too.
_C.EXITS.CONTEXT = True
# Residual blocks that a branch copies from the full path's tail, 0 to 2, for each exit or one for all; they work on
# the second grid. Behind layers 14 and 15, with CHANNELS 0, only those that the trunk has not run yet.
_C.EXITS.DEPTH = (2,)
# A branch leads from the tap to the tail through copies of the full path's layers that have no residual (those behind
# the tap of 2, 4, 7, 11 and 13): the share of their channels that stays, in (0, 1], for each exit or one for all.
_C.EXITS.COPY = (0.5,)
# Those of EXITS.LAYERS that have no branch: photos in which there is nothing to find leave there, with an empty answer
# and at no further cost. A policy that looks at the trunk decides there, such as foreseen_emptiness.
_C.EXITS.EMPTY = ()
# Class predictors in two steps with this many channels between, where that is cheaper (many classes); 0: in one.
_C.EXITS.HEAD_RANK = 0

# ---- losses -----------------------------------------------------------------------------------------------
_C.LOSS = Node()
# Classification loss: mined (cross-entropy, hard negatives) or focal (Lin et al. 2017).
_C.LOSS.CLASSIFICATION = "mined"
# Hard negatives per positive.
_C.LOSS.NEG_TO_POS_RATIO = 3.0
# Negatives mined per image at least, so that a photo without objects teaches too.
_C.LOSS.MIN_NEGATIVES = 8
# Focal loss: weight of objects in [0, 1], background has the rest.
_C.LOSS.FOCAL_ALPHA = 0.25
# Focal loss: how much easy default boxes are played down; 0 not at all.
_C.LOSS.FOCAL_GAMMA = 2.0
# Weight of each exit's loss, shallow to deep; one number serves all exits.
_C.LOSS.EXIT_WEIGHTS = (1.0,)
# Weight of the full path's loss while it trains.
_C.LOSS.FULL_WEIGHT = 1.0
# What teaches the exits: labels (boxes, and the teacher beside them), or the teacher alone: then photos need no boxes.
_C.LOSS.SUPERVISION = "labels"
# Teacher of the exits: none, full (the full path) or next (the next deeper exit).
_C.LOSS.TEACHER = "full"
# Weight of distillation beside an exit's own loss.
_C.LOSS.DISTILLATION_WEIGHT = 4.0
# Weight of boxes inside distillation.
_C.LOSS.DISTILLATION_BOX_WEIGHT = 1.0

# ---- phases -----------------------------------------------------------------------------------------------
# Which phases to run, in this order: baseline, exits, joint.
_C.PHASES = ("baseline", "exits")


def _phase(epochs: int, lr: float) -> Node:
    phase = Node()
    # Epochs of the phase; 0 skips the training and only runs the gate.
    phase.EPOCHS = epochs
    # Images per step, over all processes.
    phase.BATCH_SIZE = 24
    # sgd (momentum 0.9) or adamw.
    phase.OPTIMIZER = "adamw"
    # Peak learning rate, reached after the warm-up, then falling to zero by a cosine.
    phase.LR = lr
    # Share of all steps in which the rate rises.
    phase.WARMUP = 0.05
    # Weight decay; norms, biases and temperatures have none.
    phase.WEIGHT_DECAY = 0.0001
    # Largest norm of the gradient; 0 does not clip.
    phase.CLIP_GRADIENT = 10.0
    # Decay of the exponential moving average of the weights; 0 keeps none.
    phase.EMA = 0.0
    return phase


_C.BASELINE = _phase(epochs=24, lr=0.001)
# Input sides, pixels, that batches are shrunk to in turn, such as [320, 320, 256, 128]; () trains at MODEL.IMAGE_SIZE
# alone. A detector that has learnt from small inputs is good at a smaller size and at a glance too.
_C.BASELINE.SIZES = ()
# Keep BatchNorm's statistics as they are (a pretrained trunk, small batches, several processes).
_C.BASELINE.FREEZE_NORM = False
# Gate on the calib split: figures that the full path must reach. A checkpoint that is taken over as it is
# (BASELINE.EPOCHS 0) need only detect, AP50 0.05; of the three figures those count for it that are not the default.
_C.BASELINE.GATE = Node()
# Least AP50.
_C.BASELINE.GATE.AP50 = 0.40
# Least precision at EVAL.SCORE and EVAL.IOU.
_C.BASELINE.GATE.PRECISION = 0.60
# Least recall at EVAL.SCORE and EVAL.IOU.
_C.BASELINE.GATE.RECALL = 0.50
# Share of a reference checkpoint's figures that replaces the three absolute ones; 0 keeps those.
_C.BASELINE.GATE.RELATIVE = 0.0
# That reference checkpoint, as MODEL.WEIGHTS; empty: MODEL.WEIGHTS itself.
_C.BASELINE.GATE.REFERENCE = ""
# Its classes, as MODEL.WEIGHTS_CLASSES.
_C.BASELINE.GATE.REFERENCE_CLASSES = ""

_C.EXITS_PHASE = _phase(epochs=8, lr=0.001)
# Cache the trunk's taps instead of computing them every epoch.
_C.EXITS_PHASE.CACHE = True
# float16, or float32: twice the size, and exactly what the trunk computes.
_C.EXITS_PHASE.CACHE_DTYPE = "float16"
# Augmented views of each photo in the cache.
_C.EXITS_PHASE.CACHE_VIEWS = 2
# Largest size of the cache, GiB; a bigger one is refused with the number of views that fits.
_C.EXITS_PHASE.CACHE_GIB = 8.0
# Gate on the calib split: figures that the exits must reach.
_C.EXITS_PHASE.GATE = Node()
# Least AP50 of the first exit.
_C.EXITS_PHASE.GATE.FIRST_EXIT_AP50 = 0.30
# Replaces it where a checkpoint is taken over as it is (BASELINE.EPOCHS 0): the least share of that checkpoint's AP50
# on the same photos.
_C.EXITS_PHASE.GATE.FIRST_EXIT_SHARE = 0.75
# Least AP50 of the deepest early exit, as a share of the full path's.
_C.EXITS_PHASE.GATE.DEEPEST_SHARE = 0.85

_C.JOINT = _phase(epochs=4, lr=0.0001)
# Replaces LOSS.TEACHER in this phase: while everything moves, a shallow exit learns best from the next deeper one.
_C.JOINT.TEACHER = "next"
# Replaces LOSS.EXIT_WEIGHTS; empty: one over the exits left, so that the trunk stays the full path's.
_C.JOINT.EXIT_WEIGHTS = ()
# What the rate of the full path (trunk and head) is multiplied by; the branches take JOINT.LR itself.
_C.JOINT.FULL_PATH_LR_FACTOR = 1.0
# As BASELINE.FREEZE_NORM, here for trunk, head and branches.
_C.JOINT.FREEZE_NORM = True
# Gate on the calib split; it keeps the weights of before rather than end the run.
_C.JOINT.GATE = Node()
# Largest loss of the full path's AP50 that keeps the new weights.
_C.JOINT.GATE.MAX_AP50_DROP = 0.002

# ---- engine -----------------------------------------------------------------------------------------------
_C.ENGINE = Node()
# Mixed precision: off, bf16 or fp16 (fp16 only on CUDA). Anchors and losses stay in fp32.
_C.ENGINE.AMP = "off"
# Steps between checkpoints; the end of an epoch writes one too.
_C.ENGINE.CHECKPOINT_PERIOD = 200
# Steps between lines of the log.
_C.ENGINE.LOG_PERIOD = 20
# Epochs between points of the curves (AP of every exit, exit shares, temperatures); 0 makes none.
_C.ENGINE.CURVE_PERIOD = 1
# Photos of the calib split, a seeded choice, that the curves are measured on. They show where a training goes, no more.
_C.ENGINE.CURVE_PHOTOS = 64

# ---- routing ----------------------------------------------------------------------------------------------
_C.ROUTING = Node()
# How sure an exit is, one number per image, by the name of a policy. docs/routing.md has all of them, which are fitted
# (they need a certificate), and how to register one of your own.
_C.ROUTING.POLICY = "ambiguous_mass"
# Nobody leaves: classes from the first exit that is sure, boxes from the full path, whose classification head is then
# spared. Pays with many classes.
_C.ROUTING.HYBRID = False
# Certificate that tools/calibrate.py wrote for the weights; it replaces policy, thresholds and temperatures.
_C.ROUTING.CERTIFICATE = ""
# An image leaves at the first exit whose confidence reaches that exit's threshold, in [0, 1]; one number serves all. 2
# closes an exit: by default every image takes the full path, until tools/calibrate.py finds thresholds on your photos.
_C.ROUTING.THRESHOLDS = (2.0,)
# Temperatures that divide the exits' logits before the policy sees them: where they start; one number serves all.
# A trained model keeps its own.
_C.ROUTING.TEMPERATURES = (1.0,)
# The interval that the temperatures are held in after every step.
_C.ROUTING.TEMPERATURE_BOUNDS = (0.5, 3.0)
# Fit the temperatures by likelihood while the exits train.
_C.ROUTING.LEARN_TEMPERATURES = True

# ---- calibration ------------------------------------------------------------------------------------------
_C.CALIBRATION = Node()
# What a training calibrates its exits to before it evaluates, as tools/calibrate.py would: ap_drop (AP50 lost), risk
# (loss per photo), speedup, or "" for not at all. ROUTING.POLICY may then be one that is fitted.
_C.CALIBRATION.TARGET = ""
# The target's number, such as 0.01 AP50 lost; it holds with probability 1 - DELTA.
_C.CALIBRATION.VALUE = 0.01
_C.CALIBRATION.DELTA = 0.05
# What a photo's loss is measured against: full (what the full path says; no label is needed) or labels.
_C.CALIBRATION.REFERENCE = "full"
# The inequality behind a risk target: betting (tighter for losses that are rarely 1) or hoeffding_bentkus.
_C.CALIBRATION.BOUND = "betting"
# Cost of a photo: auto (milliseconds, measured here: in ONNX Runtime where its packages are installed and the model is
# on a CPU, else in EVAL.RUNTIME), ms (in EVAL.RUNTIME) or mmacs.
_C.CALIBRATION.COST = "auto"
# Training photos, a seeded choice, that a risk target's path of thresholds and the policies with numbers of their own
# are fitted on; 0 takes all of them.
_C.CALIBRATION.TRAIN_PHOTOS = 1000

# ---- evaluation -------------------------------------------------------------------------------------------
_C.EVAL = Node()
# Photos per batch, in each process, for evaluating and for filling the cache of taps.
_C.EVAL.BATCH_SIZE = 16
# Score at which precision, recall, F1, false positives and localisation error are counted.
_C.EVAL.SCORE = 0.5
# IoU at which a detection counts as a hit.
_C.EVAL.IOU = 0.5
# Single-image runs per exit for the milliseconds.
_C.EVAL.TIMING_RUNS = 30
# CPU threads in those runs.
_C.EVAL.TIMING_THREADS = 1
# Photos in the picture of detections per exit; 0 makes none.
_C.EVAL.PICTURES = 6
# Score from which a detection is drawn.
_C.EVAL.PICTURE_SCORE = 0.4
# What the milliseconds are measured in: eager (PyTorch), or onnxruntime (every network is exported first; CPU).
_C.EVAL.RUNTIME = "eager"
# Static detectors that the routed one is held against.
_C.EVAL.RIVALS = Node()
# Evaluate the rivals; false leaves out all of them, each exit alone too.
_C.EVAL.RIVALS.ENABLED = True
# Input sides, pixels, at which the detector without exits is tried as it stands; () means 0.8, 0.7 and 0.6 of its own.
_C.EVAL.RIVALS.SIZES = ()
# Models of this project whose full path alone is a rival, such as one trained at a smaller MODEL.IMAGE_SIZE.
_C.EVAL.RIVALS.FULL_PATHS = ()
# Models of this project with one early exit each: that exit alone, as a detector of its own.
_C.EVAL.RIVALS.SINGLE_EXITS = ()
# Exported detectors, each "format:path"; formats: yolox (YOLOX's raw output), boxes (boxes, scores and labels).
_C.EVAL.RIVALS.ONNX = ()


def get_cfg() -> Node:
    """A fresh copy of the defaults."""
    return _C.clone()
