"""Two processes of torchrun share the photos. The figures equal those of one process."""

import json
import zlib

import numpy as np
from PIL import Image

from earlyexit_ssd.files import locked_folder
from tests.tools.conftest import run_in_two_processes
from tools import calibrate, eval_exits

BATCHES_OF_THREE = ["EVAL.BATCH_SIZE", "3"]  # 3, 3 and 2 of the 8 test photos


def without_milliseconds(value):
    """Remove the measured times, and what depends on them, from metrics.json."""
    if isinstance(value, dict):
        timed = ("ms", "ms_interval", "speedup", "speedup_interval", "verdict")
        return {key: without_milliseconds(item) for key, item in value.items() if key not in timed}
    return [without_milliseconds(item) for item in value] if isinstance(value, list) else value


def test_evaluation_and_calibration_equal_those_of_one_process(trained, tmp_path):
    arguments = [*trained[1], *BATCHES_OF_THREE, "CALIBRATION.COST", "mmacs", "ROUTING.POLICY", "learned_gain"]
    target = ["--risk", "0.9", "--delta", "0.2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert calibrate.main([*arguments, *target, "--out", str(one)]) == 0
    codes, errors = run_in_two_processes("calibrate", [*arguments, *target, "--out", str(two)], tmp_path)
    assert codes == [0, 0] and errors[1] == ""
    assert (two / "certificate.json").read_bytes() == (one / "certificate.json").read_bytes()
    for split in ("calib", "train"):
        for path in (one / "recordings" / split).glob("*.npy"):
            assert np.array_equal(np.load(two / "recordings" / split / path.name), np.load(path)), path
    arguments = [*arguments, "--weights", str(one / "model.pth")]
    arguments += ["EVAL.RIVALS.ENABLED", "true", "EVAL.RIVALS.SIZES", "[96]"]
    assert eval_exits.main([*arguments, "--out", str(one / "test")]) == 0
    codes, errors = run_in_two_processes("eval_exits", [*arguments, "--out", str(two / "test")], tmp_path)
    assert codes == [0, 0] and errors[1] == ""
    assert "| 2/2 [" in errors[0] and "| 3/3 [" not in errors[0]  # batches of the first process
    mine, theirs = (json.loads((folder / "test" / "metrics.json").read_text()) for folder in (one, two))
    assert len(mine["rivals"]) > 2 and mine["context"]["images"] == 8
    assert without_milliseconds(theirs) == without_milliseconds(mine)
    names = {path.name for path in (one / "test").iterdir()}
    assert {path.name for path in (two / "test").iterdir()} == names
    assert (two / "test" / "photos.csv").read_bytes() == (one / "test" / "photos.csv").read_bytes()


def test_error_in_one_process_ends_both_and_is_printed_once(trained, tmp_path):
    arguments = [*trained[1], "--out", str(tmp_path / "out")]
    (tmp_path / "photos").mkdir()
    for name in ("0", "1"):
        Image.new("RGB", (64, 64)).save(tmp_path / "photos" / f"{name}.png")
    broken = tmp_path / "photos" / "1.png"  # the second process alone decodes it; the checksums are right
    start, _, rest = broken.read_bytes().partition(b"IDAT")
    size = int.from_bytes(start[-4:], "big")
    pixels = b"IDAT" + bytes(size)
    broken.write_bytes(start + pixels + zlib.crc32(pixels).to_bytes(4, "big") + rest[size + 4 :])
    own = ["DATA.DATASETS", f"[[own, '', {broken.parent}]]", "DATA.TEST", "[own]", "EVAL.BATCH_SIZE", "1"]
    codes, errors = run_in_two_processes("eval_exits", [*arguments, *own], tmp_path)
    assert codes == [2, 2] and errors[1] == ""
    assert errors[0].count("error: ") == 1 and "1.png" in errors[0] and "Traceback" not in errors[0]
    with locked_folder(tmp_path / "out"):  # the first process alone takes it
        codes, errors = run_in_two_processes("eval_exits", arguments, tmp_path)
    assert codes == [2, 2] and errors[1] == ""
    assert errors[0].count("error: ") == 1 and "is in use by process" in errors[0]
