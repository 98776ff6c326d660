"""``tools/export_weights.py``: files of the shipped weights, refused models, and the tool from end to end."""

import functools
import json

import pytest
import torch

from earlyexit_ssd import EarlyExitSSDLite, ExitRouter
from earlyexit_ssd.config import get_cfg
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import sha256, write_json
from earlyexit_ssd.modeling import Architecture, save_model
from tests.modeling.conftest import SMALL, small_model
from tools import eval_exits, export_weights

ship, same_model = export_weights.export_weights, functools.cache(small_model)
FIGURES = {"AP": 0.25, "AP50": 0.5, "AP50_interval": [0.25, 0.75], "mmacs": 8.0, "ms": 4.0}


def configuration(threshold: float):
    cfg = get_cfg()
    cfg.ROUTING.POLICY, cfg.ROUTING.THRESHOLDS = "max_foreground", (threshold,)
    return cfg


def run_file(path, **info):
    router = ExitRouter(2, thresholds=[0.75, 0.75], temperatures=[1.5, 2.0]).to_dict()
    info = {"phase": "exits", "forced": False, "router": router, **info}
    save_model(path, same_model(), Architecture(**SMALL), info)
    return path


def write_metrics(path, digest: str, threshold: float):
    rows = [{"name": name, "layer": 8, **FIGURES, "f1": 0.5} for name in ("exit8", "exit12", "full")]
    routed = {"policy": "max_foreground", "thresholds": [threshold] * 2, **FIGURES}
    routed["exit_share"] = {"exit8": 0.5, "exit12": 0.25, "full": 0.25}
    context = {"splits": ["toy_test"], "images": 4, "weights_sha256": digest}
    plain = {"mmacs": 16.0, "ms": 8.0, "ms_interval": [7.0, 9.0]}
    write_json(path, {"context": context, "exits": rows, "without_exits": plain, "routed": routed})
    return path


def test_weights_description_and_figures(tmp_path):
    source = run_file(tmp_path / "model.pth")
    path = ship(source, "toy", tmp_path / "w", configuration(0.5), "train it")
    digest, size = sha256(path), path.stat().st_size
    assert json.loads(path.with_suffix(".json").read_text())["metrics"] == {}
    result = write_metrics(tmp_path / "metrics.json", digest, 0.5)
    assert ship(source, "toy", tmp_path / "w", configuration(0.5), "train it", [result]) == path
    assert (sha256(path), path.stat().st_size) == (digest, size)  # the same to the byte
    entry = json.loads(path.with_suffix(".json").read_text())
    assert (entry["sha256"], entry["bytes"], entry["recipe"]) == (digest, size, "train it")
    assert (entry["classes"], entry["exits"]) == (["chair", "table"], ["exit8", "exit12", "full"])
    split = entry["metrics"]["toy_test"]
    assert (split["images"], split["without_exits"]) == (4, {"mmacs": 16.0, "ms": 8.0})
    assert split["results"] == result.as_posix()
    assert split["exits"]["exit12"] == {**FIGURES, "share": 0.25}
    assert split["exits"]["routed"] == {**FIGURES, "share": None}


def test_thresholds_of_the_configuration_and_temperatures_of_the_run(tmp_path):
    path = ship(run_file(tmp_path / "model.pth"), "toy", tmp_path, configuration(0.5), "")
    router = EarlyExitSSDLite.from_pretrained(path).router
    assert router.thresholds.tolist() == [0.5, 0.5]
    assert router.temperatures.tolist() == [1.5, 2.0]


@pytest.mark.parametrize(
    ("info", "message"),
    [({"forced": True}, "a gate was passed by --force"), ({"router": None}, "its exits are not trained")],
)
def test_refused_models(tmp_path, info, message):
    with pytest.raises(EarlyExitError, match=message):
        ship(run_file(tmp_path / "model.pth", **info), "toy", tmp_path / "w", get_cfg(), "")
    assert not (tmp_path / "w").exists()


def test_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(export_weights, "MAX_BYTES", 1000)
    with pytest.raises(EarlyExitError, match=r"toy\.pth: \d+ bytes, at most 1000 are shipped; reduce EXITS\.COPY"):
        ship(run_file(tmp_path / "model.pth"), "toy", tmp_path / "w", get_cfg(), "")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("name", ["Toy", "../toy", "", "1st", "a/b"])
def test_invalid_names(tmp_path, name):
    with pytest.raises(EarlyExitError, match="expected lower-case letters"):
        ship(tmp_path / "none.pth", name, tmp_path, get_cfg(), "")


def test_figures_of_other_weights_or_another_routing(tmp_path):
    source = run_file(tmp_path / "model.pth")
    digest = sha256(ship(source, "toy", tmp_path, configuration(0.5), ""))
    other = write_metrics(tmp_path / "other.json", "0123456789", 0.5)
    with pytest.raises(EarlyExitError, match=f"measured with weights of sha256 01234567, the shipped .* {digest[:8]}"):
        ship(source, "new", tmp_path, configuration(0.5), "", [other])
    assert not (tmp_path / "new.pth").exists()
    routed = write_metrics(tmp_path / "routed.json", digest, 0.625)
    with pytest.raises(EarlyExitError, match=r"routed with thresholds \[0\.625, 0\.625\], .* has \[0\.5, 0\.5\]"):
        ship(source, "toy", tmp_path, configuration(0.5), "", [routed])
    write_json(tmp_path / "foreign.json", {"AP": 1})
    with pytest.raises(EarlyExitError, match=r"foreign\.json: not the metrics\.json of an evaluation"):
        ship(source, "toy", tmp_path, configuration(0.5), "", [tmp_path / "foreign.json"])


def test_from_a_run_to_figures_of_the_shipped_file(trained, tmp_path, capsys):
    content = torch.load(trained[0] / "run" / "model.pth", weights_only=True)
    content["info"]["forced"] = False  # a forced run is refused
    torch.save(content, tmp_path / "model.pth")
    config, overrides = trained[1][:2], trained[1][2:]
    command = [str(tmp_path / "model.pth"), "--name", "toy", *config, "--out", str(tmp_path / "weights")]
    assert export_weights.main(command) == 0
    weights = str(tmp_path / "weights" / "toy.pth")
    assert capsys.readouterr().out.strip() == weights
    assert eval_exits.main([*config, "--weights", weights, "--out", str(tmp_path / "out"), *overrides]) == 0
    assert export_weights.main([*command, "--metrics", str(tmp_path / "out" / "metrics.json")]) == 0
    assert list(json.loads((tmp_path / "weights" / "toy.json").read_text())["metrics"]) == ["synthetic_chairs_test"]
    assert EarlyExitSSDLite.from_pretrained(weights).router is not None


def test_missing_model_is_a_one_line_error(tiny, tmp_path, capsys):
    config = tiny("run")[:2]
    assert export_weights.main([str(tmp_path / "none.pth"), "--name", "toy", *config]) == 2
    assert "none.pth: no such file of weights" in capsys.readouterr().err
