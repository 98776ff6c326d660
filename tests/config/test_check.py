import pytest
from fvcore.common.config import CfgNode

from earlyexit_ssd.config import check, get_cfg, load_config
from earlyexit_ssd.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("EXITS.LAYERS", "[99]", "EXITS.LAYERS is 99, expected trunk layers 1 to 15 .SSDLite."),
        ("EXITS.LAYERS", "[true, 8]", "expected trunk layers"),
        ("EXITS.LAYERS", "[]", "at least one layer"),
        ("EXITS.LAYERS", "[12, 8]", "increasing layers"),
        ("EXITS.LAYERS", "[8.5]", "expected trunk layers"),
        ("ROUTING.THRESHOLDS", "[1.5]", r"ROUTING.THRESHOLDS is 1.5, expected a number in \[0, 1\], or 2 to"),
        ("ROUTING.THRESHOLDS", "[high]", "expected a number"),
        ("ROUTING.THRESHOLDS", "[[1]]", "expected a number"),
        ("ROUTING.THRESHOLDS", "[0.1, 0.2, 0.3]", "one for each of 2 exits"),
        ("ROUTING.TEMPERATURE_BOUNDS", "[3.0, 0.5]", "low below high"),
        ("ROUTING.TEMPERATURES", "[9.0]", "inside"),
        ("DATA.ON_BAD", "ignore", "expected one of 'repair', 'refuse', 'skip'"),
        ("DATA.AUGMENTATION", "sdd", "'sdd', expected one of .*did you mean 'ssd'"),
        ("DATA.NEGATIVE_SHARE", "2", "share in"),
        ("DATA.REPEAT_THRESHOLD", "5", r"in \[0, 1\]"),
        ("DATA.TEST", "[synthetic_chairs_train]", "TRAIN, CALIB and TEST without a data set in common"),
        ("DATA.TRAIN", "[]", "at least one data set name"),
        ("DATA.TRAIN", "[5]", "DATA.TRAIN is 5, expected the name of a data set"),
        ("PHASES", "[]", "some of"),
        ("JOINT.BATCH_SIZE", "1", "2 or more"),
        ("EXITS_PHASE.CACHE_DTYPE", "float61", "did you mean 'float16'"),
        ("JOINT.TEACHER", "nxet", "did you mean 'next'"),
        ("JOINT.EXIT_WEIGHTS", "[1, 2, 3]", "none, one, or 2 numbers"),
        ("EXITS.HEAD_RANK", "-1", "EXITS.HEAD_RANK is -1, expected a number of at least 0"),
        ("PHASES", "[exits, baseline]", "in the order"),
        ("PHASES", "[baseline, joint]", "exits before joint"),
        ("PHASES", "[exits]", "baseline first, unless MODEL.WEIGHTS"),
        ("PHASES", "[base]", "did you mean 'baseline'"),
        ("BASELINE.LR", "0", "BASELINE.LR is 0.0, expected a number above 0"),
        ("BASELINE.LR", ".nan", "expected a number above 0"),
        ("BASELINE.LR", ".inf", "expected a number above 0"),
        ("JOINT.EMA", "1.0", "a decay below 1"),
        ("MODEL.IMAGE_SIZE", "10", "64 to 4096 pixels"),
        ("MODEL.IMAGE_SIZE", "100000000", "64 to 4096 pixels"),
        ("DATA.SYNTHETIC.IMAGE_SIZE", "63", "64 to 4096 pixels"),
        ("CALIBRATION", "{TARGET: speedup}", "CALIBRATION.VALUE is 0.01, expected a number above 1 with CALIB"),
        ("SEED", "9223372036854775808", "a number below 2"),
        ("OUTPUT_DIR", "''", "the folder of the results"),
        ("EVAL.SCORE", "-0.1", r"in \[0, 1\]"),
        ("EVAL.IOU", "0", r"in \(0, 1\]"),
        ("DATA.SYNTHETIC.SEED", "-1", "DATA.SYNTHETIC.SEED is -1, expected a number of at least 0"),
        ("DATA.SYNTHETIC.SIZES", "[1, -1, 1]", "DATA.SYNTHETIC.SIZES is -1, expected a number above 0"),
        ("DATA.SYNTHETIC.SIZES", "[5, 5]", "three whole numbers"),
        ("DATA.SYNTHETIC.SIZES", "[5.5, 5, 5]", "three whole numbers"),
        ("DATA.CLASSES", "[yes]", "DATA.CLASSES is True, expected names of classes"),
        ("DATA.CLASSES", "[chair, Chair]", "DATA.CLASSES is 'chair', expected each name once"),
        ("DATA.TRAIN", "[a, a]", "DATA.TRAIN is 'a', expected each name once"),
        ("BASELINE.GATE.RELATIVE", "0.9", "expected 0 without BASELINE.GATE.REFERENCE"),
        ("EVAL.RUNTIME", "onnx", "expected one of 'eager', 'onnxruntime'"),
        ("EVAL.RIVALS.SIZES", "[32]", "EVAL.RIVALS.SIZES is 32, expected whole numbers from 64 to 4096 pixels"),
        ("EVAL.RIVALS.SIZES", "[224.0]", "expected whole numbers"),
        ("EVAL.RIVALS.FULL_PATHS", "[8]", "EVAL.RIVALS.FULL_PATHS is 8, expected paths"),
        ("EVAL.RIVALS.SINGLE_EXITS", "[8]", "EVAL.RIVALS.SINGLE_EXITS is 8, expected paths"),
        ("EVAL.RIVALS.ONNX", "nano.onnx", "EVAL.RIVALS.ONNX is 'nano.onnx', expected format:path"),
        ("EVAL.RIVALS.ONNX", "['yolo:nano.onnx']", "one of the formats yolox, boxes, nanodet, picodet"),
        ("LOSS.SUPERVISION", "teachers", "did you mean 'teacher'"),
    ],
)
def test_invalid_values(key, value, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [key, value])


def test_glances_have_thresholds():
    thresholds = ["ROUTING.THRESHOLDS", "[0.1, 0.2, 0.3]", "EXITS.GLANCES", "[[64, 8]]"]
    assert load_config(None, thresholds).ROUTING.THRESHOLDS == (0.1, 0.2, 0.3)


def test_another_detector_may_have_more_layers_than_ssdlite():
    name = ["MODEL.NAME", "of_the_user", "EXITS.LAYERS", "[5, 40]"]
    assert load_config(None, [*name, "EXITS.GLANCES", "[[64, 30]]"]).EXITS.LAYERS == (5, 40)
    for wrong in ([*name, "EXITS.LAYERS", "[0]"], ["EXITS.GLANCES", "[[64, 16]]"]):
        with pytest.raises(ConfigError, match="trunk layer"):
            load_config(None, wrong)


def test_weights_are_not_compared_with_themselves():
    trained = ["MODEL.WEIGHTS", "COCO_V1", "BASELINE.GATE.RELATIVE", "0.9"]
    load_config(None, trained)
    with pytest.raises(ConfigError, match="BASELINE.GATE.RELATIVE"):
        load_config(None, [*trained, "BASELINE.EPOCHS", "0"])


def test_teacher_supervision_needs_a_teacher():
    with pytest.raises(ConfigError, match="LOSS.TEACHER is 'none', expected 'full' or 'next'"):
        load_config(None, ["LOSS.SUPERVISION", "teacher", "LOSS.TEACHER", "none"])
    keys = ["LOSS.SUPERVISION", "teacher", "LOSS.TEACHER", "full", "JOINT.TEACHER", "none"]
    assert load_config(None, keys).JOINT.TEACHER == "none"  # there is no joint phase
    with pytest.raises(ConfigError, match="JOINT.TEACHER is 'none', expected 'full' or 'next'"):
        load_config(None, [*keys, "PHASES", "[baseline, exits, joint]"])


def test_certificate_and_hybrid_routing_exclude_each_other():
    with pytest.raises(ConfigError, match=r"ROUTING.HYBRID is True, expected false with ROUTING.CERTIFICATE"):
        load_config(None, ["ROUTING.HYBRID", "true", "ROUTING.CERTIFICATE", "c.json"])


def test_every_number_has_a_rule():
    def numbers(node, above=""):
        for key, value in node.items():
            if isinstance(value, CfgNode):
                yield from numbers(value, f"{above}{key}.")
            elif isinstance(value, int | float | tuple) and not isinstance(value, bool):
                yield f"{above}{key}"

    ruled = {key for keys, *_ in check._OF_EACH_VALUE for key in keys.split()} | set(check.CHOICES)
    # the catalog and the registry of branches check these
    assert set(numbers(get_cfg())) - ruled == {"DATA.DATASETS", "EXITS.BRANCH"}
