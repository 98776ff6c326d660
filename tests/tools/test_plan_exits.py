import json

import pytest

from tools import plan_exits


def command(tiny, tmp_path, *flags, overrides=()):
    config, own = tiny("run")[:2], tiny("run")[2:]
    return [*config, "--out", str(tmp_path / "plan"), *flags, "--", *own, *overrides]


def test_costs_of_every_layer_need_no_photo(tiny, tmp_path, capsys):
    assert plan_exits.main(command(tiny, tmp_path, "--speedup", "1000", overrides=("DATA.ROOT", "nowhere"))) == 0
    plan = json.loads((tmp_path / "plan" / "placement.json").read_text())
    assert [row["layer"] for row in plan["placements"]] == list(range(1, 13))
    mmacs = [row["mmacs"] for row in plan["placements"]]
    assert mmacs[5] < mmacs[7] < mmacs[11]
    assert plan["proposal"] is None
    assert "no exit can reach 1000x" in capsys.readouterr().out
    assert (tmp_path / "plan" / "placement.png").stat().st_size > 0


def test_probes_give_a_proposal(tiny, trained, tmp_path, capsys):
    flags = ("--layers", "8", "12", "--probe-epochs", "1", "--speedup", "0.01")
    weights = str(trained[0] / "run" / "baseline" / "model.pth")
    for _ in range(2):  # a second plan in the same folder replaces the first
        assert plan_exits.main(command(tiny, tmp_path, *flags, overrides=("MODEL.WEIGHTS", weights))) == 0
    plan = json.loads((tmp_path / "plan" / "placement.json").read_text())
    assert all(0 <= row["AP50"] <= 1 for row in plan["placements"])
    assert sum(plan["proposal"]["shares"]) == pytest.approx(1)
    assert "proposed: EXITS.LAYERS" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "plan").iterdir()}
    assert names == {"placement.json", "placement.txt", "placement.png"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--layers", "12", "8"), "EXITS.LAYERS is (12, 8), expected increasing layers, each once"),
        (("--layers", "16"), "EXITS.LAYERS is 16, expected trunk layers 1 to 15"),
        (("--speedup", "0"), "the wanted speed-up is 0, expected a number above 0"),
        (("--probe-epochs", "-1"), "a probe needs a trained full path: set MODEL.WEIGHTS"),
        (("--probe-epochs", "1"), "a probe needs a trained full path: set MODEL.WEIGHTS"),
    ],
)
def test_mistakes_are_one_line(tiny, tmp_path, capsys, flags, message):
    assert plan_exits.main(command(tiny, tmp_path, *flags)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "plan").exists()
