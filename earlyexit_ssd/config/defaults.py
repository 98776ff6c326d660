"""The one default configuration tree: routing, calibration and evaluation on top of defaults_training.py.

docs/config.md is generated from the two files and their comments.
"""

from fvcore.common.config import CfgNode as Node

from earlyexit_ssd.config.defaults_training import _C

# ---- routing ----------------------------------------------------------------------------------------------
_C.ROUTING = Node()
# How sure an exit is, one number per image: ambiguous_mass, max_foreground, entropy, margin, emptiness,
# mean_foreground; balanced_ambiguity, foreseen_emptiness and learned_gain, which are fitted (they need a certificate).
# In Python also one of your own. Which is good at what: docs/routing.md.
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
# What a photo's loss is measured against: full (what the full path says; no label is needed) or labels.
_C.CALIBRATION.REFERENCE = "full"
# The inequality behind a risk target: betting (tighter for losses that are rarely 1) or hoeffding_bentkus.
_C.CALIBRATION.BOUND = "betting"
# Cost of a photo: auto (milliseconds, measured here: in ONNX Runtime where its packages are installed and the model is
# on a CPU, else in EVAL.RUNTIME), ms (in EVAL.RUNTIME) or mmacs.
_C.CALIBRATION.COST = "auto"
# Training photos, a seeded choice, that a risk target's path of thresholds and the policies learned_gain and
# foreseen_emptiness are fitted on (for a risk target balanced_ambiguity too); 0 takes all of them.
_C.CALIBRATION.TRAIN_PHOTOS = 1000

# ---- evaluation -------------------------------------------------------------------------------------------
_C.EVAL = Node()
# Photos per batch, for evaluating and for filling the cache of taps.
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
