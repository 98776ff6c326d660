import json
import math

import pytest
import torch
from torchvision.io import decode_image
from torchvision.models import get_model

from earlyexit_ssd import EarlyExitSSDLite, ExitRouter
from earlyexit_ssd.data.shapes import FOLDER
from earlyexit_ssd.evaluation.results import Results
from earlyexit_ssd.evaluation.verdict import judge
from tests.tools.conftest import log, run_in_two_processes, run_with_torchrun
from tools import eval_exits, train_net


def test_whole_training_and_its_curves(tiny, tmp_path, capsys):
    exits = ("EXITS.LAYERS", "[12, 14]", "EXITS.CHANNELS", "0", "EXITS.DEPTH", "[2]")
    whole = ("PHASES", "[baseline, exits, joint]", "EVAL.PICTURES", "2", "EVAL.RIVALS.ENABLED", "true")
    assert train_net.main(tiny("run", "--force", *whole, *exits)) == 0
    folder, names = tmp_path / "run", ["exit12", "exit14", "full"]
    files = {path.name for path in folder.iterdir()}
    assert files >= {"config.yaml", "run.json", "table.txt", "detections.png", "curves.png", "model.pth", "report.html"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [entry["name"] for entry in metrics["exits"]] == names
    assert sum(metrics["routed"]["exit_share"].values()) == pytest.approx(1)
    (finding,) = metrics["verdict"]["findings"]  # the only one
    assert finding["veto"] and "the full path does not detect" in finding["line"] and "--force" in finding["line"]
    run = json.loads((folder / "run.json").read_text())
    assert run["seed"] == 0
    assert run["torch"] == torch.__version__
    assert "verdict" in capsys.readouterr().out
    photos = (folder / "photos.csv").read_text().splitlines()
    assert photos[0] == "file,exit,confidence,objects,found,lost,added" and len(photos) == 1 + 8
    ends = [line for line in log(folder, "baseline") if "AP50/full" in line]
    assert [line["epoch"] for line in ends] == [1.0, 2.0] and not any("AP50/exit12" in line for line in ends)
    *_, last = log(folder, "exits")
    assert {key for key in last if "/" in key and not key.startswith("loss/")} == {
        *(f"{kind}/{name}" for kind in ("AP", "AP50", "share") for name in names),
        *(f"{kind}/{name}" for kind in ("confidence", "temperature") for name in names[:-1]),
    }
    assert sum(last[f"share/{name}"] for name in names) == pytest.approx(1.0)
    router = torch.load(folder / "exits" / "model.pth", weights_only=True)["info"]["router"]
    assert [last["temperature/exit12"], last["temperature/exit14"]] == router["temperatures"]
    assert "loss/exit12_temperature" in last
    # The weights have a forced gate, so a later evaluation reports it too.
    assert eval_exits.main([*tiny("run", *exits), "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["context"]["forced"]
    assert [entry["AP50"] for entry in again["exits"]] == [entry["AP50"] for entry in metrics["exits"]]


def test_failed_gate_ends_with_3_and_prints_advice(tiny, tmp_path, capsys):
    assert train_net.main(tiny("run")) == 3
    error = capsys.readouterr().err
    assert "gate of phase baseline failed: AP50" in error
    assert "try: more epochs than 2 (BASELINE.EPOCHS)" in error
    assert not (tmp_path / "run" / "exits").exists()
    assert "The gate of phase baseline failed: AP50" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    # The advice can be followed: the phase starts again with more epochs, and later phases may change too.
    more = ("BASELINE.EPOCHS", "3", "BASELINE.GATE.AP50", "0.0", "BASELINE.GATE.PRECISION", "0.0")
    more += ("BASELINE.GATE.RECALL", "0.0", "EXITS.LAYERS", "[10]")
    train_net.main(tiny("run", "--resume", "--force", *more))
    assert "phase baseline starts again, since BASELINE.EPOCHS has changed" in capsys.readouterr().err
    assert len(log(tmp_path / "run", "baseline")) == 18
    assert len(log(tmp_path / "run", "baseline/before_1")) == 12
    assert (tmp_path / "run" / "baseline" / "before_1" / "last.pth").is_file()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [entry["name"] for entry in metrics["exits"]] == ["exit10", "full"]


def rendered(data_root):
    """Folder of the rendered photos."""
    (scenes,) = (path.parent for path in (data_root / FOLDER).glob("*/annotations"))
    return scenes


def test_no_photo_leaves_before_calibration(trained, data_root):
    metrics = json.loads((trained[0] / "run" / "metrics.json").read_text())
    assert not metrics["context"]["untrained"]
    assert metrics["routed"]["exit_share"] == {"exit8": 0.0, "exit12": 0.0, "full": 1.0}
    assert metrics["routed"]["AP50"] == metrics["exits"][-1]["AP50"]
    assert metrics["routed"]["mmacs"] == metrics["without_exits"]["mmacs"]  # no branch is paid for
    found = {**metrics, "exits": [{**row, "AP50": 0.5, "found": None} for row in metrics["exits"]]}
    lines = judge(Results.from_json(found)).lines
    assert any("every exit is closed until routing is calibrated" in line for line in lines)
    photos = [decode_image(str(path)) / 255 for path in sorted((rendered(data_root) / "test").glob("*.*"))]
    model = EarlyExitSSDLite.from_pretrained(trained[0] / "run" / "model.pth")
    fresh = get_model(
        "earlyexit_ssdlite320_mobilenet_v3_large", weights_backbone=None, num_classes=2, image_size=64, width=0.25,
        router=ExitRouter(2),
    ).eval()  # fmt: skip
    with torch.inference_mode():
        for detector in (model, fresh):
            assert {int(detections["exit_index"]) for detections in detector(photos)} == {2}


def test_flags_and_keys_in_any_order(tiny, tmp_path):
    config, overrides = tiny("run")[:2], tiny("run")[2:]
    epochs = ["BASELINE.EPOCHS", "0"]
    assert train_net.main([*overrides, "--force", "PHASES", "[baseline]", *config, "SEED", "1", *epochs]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["context"]["untrained"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["EXITS.LAYER", "8"], "did you mean 'LAYERS'"),
        (["DATA.TRAIN", "synthetic_chair_train"], "did you mean 'synthetic_chairs_train'"),
        (["DATA.CLASSES", "chiar"], "did you mean 'chair'"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "nowhere.pth: no such file"),
        (["DEVICE", "cuda:77"], "DEVICE 'cuda:77' is not available here"),
        (["DEVICE", "meta"], "DEVICE 'meta' is not available here"),
        (["BASELINE.GATE.RELATIVE", "0.9"], "expected 0 without BASELINE.GATE.REFERENCE"),
        (["BASELINE.GATE.RELATIVE", "0.9", "BASELINE.GATE.REFERENCE", "none.pth"], "none.pth: no such file"),
        (["MODEL.WEIGHTS_BACKBONE", "IMAGENET_V1"], "did you mean 'IMAGENET1K_V1'"),
        (["EVAL.RIVALS.ENABLED", "true", "EVAL.RIVALS.ONNX", "yolox:none.onnx"], "ONNX has none.onnx: no such file"),
        (["DATA.TEST", "nowhere"], "no data set is named 'nowhere'"),
        (["EXITS_PHASE.CACHE_GIB", "1e-6"], "EXITS_PHASE.CACHE_GIB allows"),
    ],
)
def test_bad_input_is_a_one_line_error(tiny, capsys, more, message):
    assert train_net.main(tiny("run", "BASELINE.EPOCHS", "0", *more)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_exits_train_on_photos_without_boxes(tiny, trained, data_root, tmp_path, capsys, without_evaluation):
    scenes = rendered(data_root)
    tree = json.loads((scenes / "annotations" / "instances_train.json").read_text())
    (data_root / "no_boxes.json").write_text(json.dumps({**tree, "annotations": []}))
    own = ["DATA.DATASETS", f"[[mine, no_boxes.json, {scenes.relative_to(data_root)}/train]]", "DATA.TRAIN", "mine"]
    own += ["MODEL.WEIGHTS", str(trained[0] / "run" / "baseline" / "model.pth"), "BASELINE.EPOCHS", "0"]
    assert train_net.main(tiny("labels", "--force", *own)) == 2
    assert "mine: no box of chair in 24 photos, expected at least one; add photos" in capsys.readouterr().err
    assert train_net.main(tiny("teacher", "--force", *own, "LOSS.SUPERVISION", "teacher")) == 0
    entries = log(tmp_path / "teacher", "exits")
    assert "loss/exit8_distillation" in entries[0] and "loss/exit8_classification" not in entries[0]
    assert entries[-1]["loss/exit8_distillation"] < entries[0]["loss/exit8_distillation"]


def test_mixed_precision_trains_every_phase(tiny, tmp_path, without_evaluation):
    epochs = ("BASELINE.EPOCHS", "1", "EXITS_PHASE.EPOCHS", "1")
    assert train_net.main(tiny("run", "--force", "ENGINE.AMP", "bf16", *epochs)) == 0
    for phase in ("baseline", "exits"):
        assert all(math.isfinite(entry["loss"]) for entry in log(tmp_path / "run", phase))


def test_two_processes_end_with_one_model(tiny, tmp_path):
    """Statistics of BatchNorm differ between processes until a phase ends. The next phase checks that they agree."""
    more = ("--force", "BASELINE.EPOCHS", "1", "EXITS_PHASE.EPOCHS", "1", "EXITS_PHASE.CACHE", "false")
    more += ("CALIBRATION.TARGET", "speedup", "CALIBRATION.VALUE", "1.01", "CALIBRATION.COST", "mmacs")
    run_with_torchrun("train_net", tiny("two", *more), tmp_path / "stderr")
    assert (tmp_path / "two" / "calibration" / "certificate.json").is_file()
    assert (tmp_path / "two" / "metrics.json").is_file()


def test_two_processes_have_the_losses_of_one(tiny, tmp_path, without_evaluation):
    # BatchNorm's statistics are per process, so they are frozen here.
    more = ("--force", "BASELINE.FREEZE_NORM", "true", "BASELINE.EPOCHS", "1", "PHASES", "[baseline]")
    more += ("EVAL.BATCH_SIZE", "3", "EVAL.SCORE", "0.02")
    assert train_net.main(tiny("one", *more)) == 0
    assert run_in_two_processes("train_net", tiny("two", *more), tmp_path)[0] == [0, 0]
    one, two = log(tmp_path / "one", "baseline"), log(tmp_path / "two", "baseline")
    assert len(one) == len(two) == 6
    for mine, theirs in zip(one, two, strict=True):
        for key in ("bbox_regression", "classification"):
            assert theirs[f"loss/{key}"] == pytest.approx(mine[f"loss/{key}"], abs=1e-4)
    # Each process evaluates some of the photos. The last point of the curve and the gate have the same weights.
    gate = json.loads((tmp_path / "two" / "baseline" / "gate.json").read_text())
    (measured,) = [check["value"] for check in gate["checks"] if check["name"] == "AP50"]
    assert two[-1]["AP50/full"] == pytest.approx(measured, abs=1e-6) and measured > 0
    assert two[-1]["AP50/full"] == pytest.approx(one[-1]["AP50/full"], abs=0.01)
