import json

import pytest

from benchmarks import compare_recipes
from benchmarks.compare_recipes import read_recipes, recipe_table
from earlyexit_ssd.config import load_config
from earlyexit_ssd.files import sha256, write_json, write_text
from tests.tools.conftest import ROOT


@pytest.fixture
def command(tiny, trained, tmp_path):
    """Return a function that writes recipes and returns the arguments to compare them with a trained full path."""
    weights = str(trained[0] / "run" / "baseline" / "model.pth")

    def arguments(recipes: str, *seeds: str) -> list[str]:
        write_text(tmp_path / "recipes.yaml", recipes)
        config, own = tiny("run")[:2], tiny("run")[2:]
        flags = ["--recipes", str(tmp_path / "recipes.yaml"), "--out", str(tmp_path / "out"), "--seeds", *seeds]
        return [*config, *flags, "--", *own, "MODEL.WEIGHTS", weights, "EXITS_PHASE.EPOCHS", "1"]

    return arguments


@pytest.fixture
def compare(command, tmp_path):
    """Return a function that compares recipes and returns the rows of recipes.json."""

    def rows(recipes: str, *seeds: str) -> list[dict]:
        assert compare_recipes.main(command(recipes, *seeds)) == 0
        return json.loads((tmp_path / "out" / "recipes.json").read_text())

    return rows


def test_recipes_share_taps_and_finished_trials_are_kept(compare, tmp_path, capsys):
    compare("plain: {}\n", "0")
    first = tmp_path / "out" / "plain" / "seed0" / "result.json"
    written = first.stat().st_mtime_ns
    both = "_ALL_: {EXITS.DEPTH: 1}\nplain: {}\nthin tail: {EXITS.DEPTH: 0, LOSS.CLASSIFICATION: focal}\n"
    rows = compare(both, "0", "1")
    trials = [("plain", 0), ("plain", 1), ("thin tail", 0), ("thin tail", 1)]
    assert [(row["recipe"], row["seed"]) for row in rows] == trials
    assert first.stat().st_mtime_ns == written
    assert len(list((tmp_path / "out" / "taps").iterdir())) == 2  # one per seed, shared by the recipes
    plain, thin = rows[0], rows[2]
    assert all(thin[key]["exit8"] < plain[key]["exit8"] for key in ("parameters", "mmacs"))
    assert thin["settings"]["LOSS"]["CLASSIFICATION"] == "focal"
    assert thin["settings"]["MODEL"]["WEIGHTS"] == "model.pth"  # no path of this machine
    assert all(0 <= value <= 1 for row in rows for value in row["AP50"].values())
    assert "| thin tail | 2 |" in capsys.readouterr().out


def test_trial_with_other_weights_or_settings_is_trained_again(compare, trained):
    """The weights have the same file name, so their hash tells them apart."""
    other, keys = trained[0] / "run" / "model.pth", ("", f"MODEL.WEIGHTS: {trained[0]}/run/model.pth", "EXITS.DEPTH: 0")
    first, second, third = (compare(f"one: {{{key}}}\n", "0")[0]["settings"] for key in keys)
    assert first["MODEL"] == second["MODEL"] and first["SHA256"]["TRAIN"] == second["SHA256"]["TRAIN"]
    assert first["SHA256"]["WEIGHTS"] != second["SHA256"]["WEIGHTS"] == sha256(other)
    assert (first["EXITS"]["DEPTH"], third["EXITS"]["DEPTH"]) == ([1], [0])


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ("good: {}\nbad: {EXITS.DEPHT: 1}\n", "recipe 'bad': unknown key EXITS.DEPHT (did you mean 'DEPTH'?)"),
        ("own: {SEED: 1}\n", "recipe 'own': SEED is set, but recipes are trained with each of --seeds"),
        ("bare: {MODEL.WEIGHTS: ''}\n", "recipe 'bare' needs a trained full path; set MODEL.WEIGHTS"),
        ("bad: 3\n", "recipe 'bad' is 3, expected keys and values"),
        ("", "expected lines such as"),
        ("_ALL_: {EXITS.DEPTH: 1}\n", "has _ALL_ only, expected recipes; add a recipe"),
        ("one two: {}\none_two: {}\n", "recipes 'one two' and 'one_two' have the same folder one_two"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_invalid_recipes_are_one_line_errors_before_training(command, tmp_path, capsys, recipes, message):
    assert compare_recipes.main(command(recipes, "0")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_minutes_include_interrupted_sessions(compare, tmp_path):
    """The result of an interrupted trial has its seconds."""
    (row,) = compare("plain: {}\n", "0")
    path = tmp_path / "out" / "plain" / "seed0" / "result.json"
    write_json(path, {"settings": row["settings"], "seconds": 600.0})
    (again,) = compare("plain: {}\n", "0")
    assert 10 < again["minutes"] < 10 + 10 * row["minutes"] + 1
    assert "seconds" not in again


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_project_are_valid(path):
    for name, keys in read_recipes(path).items():
        overrides = [text for key, value in keys.items() for text in (key, str(value))]
        assert load_config(ROOT / "configs" / "voc_animals.yaml", overrides), name


def trial(recipe, seed, ap50, **more):
    ap50, mmacs, parameters = {"exit8": ap50, "full": 0.7}, {"exit8": 250.4, "full": 600.0}, {"exit8": 1_234_567}
    figures = {"AP50": ap50, "mmacs": mmacs, "parameters": parameters}
    return {"recipe": recipe, "seed": seed, "minutes": 3.0 + seed, **figures, **more}


def test_table_has_a_row_per_recipe():
    table = recipe_table([trial("thin", 0, 0.5), trial("wide", 0, 0.6), trial("thin", 1, 0.54)]).splitlines()
    assert table[0] == "| recipe | seeds | minutes | exit8 AP50 | exit8 MMAC | exit8 M param. |"
    assert table[2] == "| thin | 2 | 3.5 | 0.520 (0.500 to 0.540) | 250 | 1.23 |"
    assert table[3] == "| wide | 1 | 3.0 | 0.600 | 250 | 1.23 |"
    other = trial("two", 0, 0.5, AP50={"exit4": 0.1}, mmacs={"exit4": 9.0}, parameters={"exit4": 10_000})
    table = recipe_table([trial("thin", 0, 0.5), other]).splitlines()
    assert table[3] == "| two | 1 | 3.0 | - | - | - | 0.100 | 9 | 0.01 |"
