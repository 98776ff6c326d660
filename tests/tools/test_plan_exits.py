import json

import pytest

from tools import plan_exits


def command(tiny, tmp_path, *flags):
    config, overrides = tiny("run")[:2], tiny("run")[2:]
    return [*config, "--out", str(tmp_path / "plan"), *flags, "--", *overrides]


def test_costs_of_every_layer_need_no_photo(tiny, tmp_path, capsys):
    assert plan_exits.main([*command(tiny, tmp_path, "--speedup", "1000"), "DATA.ROOT", "nowhere"]) == 0
    plan = json.loads((tmp_path / "plan" / "placement.json").read_text())
    assert [row["layer"] for row in plan["placements"]] == list(range(1, 16))
    mmacs = [row["mmacs"] for row in plan["placements"]]
    assert mmacs[4:8] == sorted(mmacs[4:8])
    assert plan["proposal"] is None
    assert "no exit can reach 1000x" in capsys.readouterr().out
    assert (tmp_path / "plan" / "placement.png").stat().st_size > 0


def test_probes_give_a_proposal(tiny, tmp_path, capsys):
    flags = ("--layers", "8", "12", "--probe-epochs", "1", "--speedup", "0.01")
    assert plan_exits.main(command(tiny, tmp_path, *flags)) == 0
    plan = json.loads((tmp_path / "plan" / "placement.json").read_text())
    assert all(0 <= row["AP50"] <= 1 for row in plan["placements"])
    assert sum(plan["proposal"]["shares"]) == pytest.approx(1)
    assert "proposed: EXITS.LAYERS" in capsys.readouterr().out
    assert not (tmp_path / "plan" / "exits" / "taps").exists()


def test_impossible_layers_are_one_line(tiny, tmp_path, capsys):
    assert plan_exits.main(command(tiny, tmp_path, "--layers", "12", "8")) == 2
    assert "error: layers (12, 8): expected increasing trunk layers from 1 to 15" in capsys.readouterr().err
