import os
import re

import pytest

from earlyexit_ssd.config import get_cfg, load_config
from earlyexit_ssd.errors import ConfigError


def write(path, text):
    path.write_text(text)
    return path


def test_order_of_defaults_base_file_and_overrides(tmp_path):
    write(tmp_path / "base.yaml", "SEED: 3\nMODEL: {WIDTH: 0.5, IMAGE_SIZE: 160}\n")
    path = write(tmp_path / "mine.yaml", "_BASE_: base.yaml\nMODEL: {WIDTH: 0.75}\nEXITS: {LAYERS: [6, 12]}\n")
    cfg = load_config(path, ["EXITS.CHANNELS", "32", "DATA.CLASSES", "[chair]"])
    assert (cfg.SEED, cfg.MODEL.WIDTH, cfg.MODEL.IMAGE_SIZE) == (3, 0.75, 160)
    assert (cfg.EXITS.LAYERS, cfg.EXITS.CHANNELS, cfg.DATA.CLASSES) == ((6, 12), 32, ("chair",))
    assert cfg.OUTPUT_DIR == "output/mine" and cfg.is_frozen()
    assert cfg.EXITS.DEPTH == get_cfg().EXITS.DEPTH


def test_dumped_configuration_loads_again(tmp_path):
    cfg = load_config(None, ["DATA.DATASETS", "[[mine, a.json, photos]]", "OUTPUT_DIR", "x"])
    assert load_config(write(tmp_path / "again.yaml", cfg.dump())) == cfg


BOMB = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
MERGES = "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("EXITS: {LAYER: [8]}", r"bad.yaml: unknown key EXITS.LAYER \(did you mean 'LAYERS'\?\)"),
        ("MODLE: {}", r"unknown key MODLE \(did you mean 'MODEL'\?\)"),
        ("EXITS: {ZZZ: 1}", "EXITS has LAYERS, CHANNELS"),
        ("EXITS: {CHANNELS: wide}", "EXITS.CHANNELS expects a whole number"),
        ("EXITS: {CHANNELS: 64.5}", "EXITS.CHANNELS expects a whole number"),
        ("EXITS: {CHANNELS: true}", "EXITS.CHANNELS expects a whole number"),
        ("ROUTING: {HYBRID: 1}", "ROUTING.HYBRID expects true or false"),
        ("EXITS: 5", "EXITS expects keys below it"),
        ("SEED: {A: 1}", "SEED expects a whole number"),
        ("EXITS: {LAYERS: [99]}", "bad.yaml: EXITS.LAYERS is 99, expected"),
        ("[1, 2]", "expected KEY: value lines"),
        ("a: [", "not valid YAML"),
        ("_BASE_: none.yaml", "no such configuration file"),
        ("_BASE_: bad.yaml", "circular _BASE_; remove it"),
        ("SEED: !!int x", "not valid YAML .*invalid literal for int"),
        ("OUTPUT_DIR: !!timestamp x", "not valid YAML .*could not determine a constructor"),
        ("SEED: !!python/name:os.system", "not valid YAML .*could not determine a constructor"),
        ("DATA: &a {TRAIN: *a}", "nested more than 32 deep"),
        (f"DATA: {{TRAIN: {'[' * 40}{']' * 40}}}", "nested more than 32 deep"),
        (f"DATA: {'[' * 2000}", "nested too deeply"),
        (f"a0: &a0 [x]\n{BOMB}", "more than 100000 values"),
        (f"a0: &a0 {{x: 1}}\n{MERGES}", "more than 100000 values"),
        ("SEED: 1\nSEED: 2", "the key 'SEED' is given twice"),
        ("DATA: {ROOT: a, ROOT: b}", "the key 'ROOT' is given twice"),
        (f"SEED: {'9' * 400}", "a whole number of more than 64 bits"),
        (f"SEED: 0x{'f' * 5000}", "a whole number of more than 64 bits"),
        ('OUTPUT_DIR: "a\\0b"', "OUTPUT_DIR has .*expected text without control characters"),
        ('DATA: {CLASSES: ["a\\nb"]}', "DATA.CLASSES has .*expected text without control characters"),
        ('_BASE_: "a\\0b"', "_BASE_ is .*expected the name of a YAML file"),
        ("_BASE_: [a, b]", "_BASE_ is .*expected the name of a YAML file"),
        (f"SEED: {'x' * 10_000}", "bad.yaml: SEED expects a whole number .*got 'xxx"),
        (f"{'x' * 1000}: 1", "bad.yaml: unknown key .*xxx"),
        ("MODEL: {WIDTH: 1000000}", "MODEL.WIDTH is 1000000.0, expected at most 4"),
        ("THREADS: 4611686018427387904", "THREADS is 4611686018427387904, expected at most 1024"),
    ],
)
def test_invalid_file_is_a_short_one_line_error(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(tmp_path / "bad.yaml", text))
    assert str(error.value).isprintable() and len(str(error.value)) < 300


def test_too_long_chain_of_base_files(tmp_path):
    for number in range(22):
        write(tmp_path / f"{number}.yaml", f"_BASE_: {number + 1}.yaml")
    with pytest.raises(ConfigError, match="a chain of more than 20 _BASE_ files; merge some of them"):
        load_config(tmp_path / "0.yaml")


def test_paths_that_are_not_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", tmp_path, "a\0b"):
        with pytest.raises(ConfigError, match="cannot be read as a configuration file .*(not a regular|null byte)"):
            load_config(path)


def test_an_impossible_value_names_the_file_that_sets_it(tmp_path):
    base = write(tmp_path / "base.yaml", "EXITS: {LAYERS: [99]}\nSEED: 1")
    mine = write(tmp_path / "mine.yaml", "_BASE_: base.yaml\nSEED: 2")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(base))}: EXITS.LAYERS is 99"):
        load_config(mine)
    write(tmp_path / "mine.yaml", "_BASE_: base.yaml\nEXITS: {LAYERS: [98]}")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(mine))}: EXITS.LAYERS is 98"):
        load_config(mine)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SEED"], "the last key 'SEED' has no value$"),
        (["SEED=3"], "the last key 'SEED=3' has no value; write a space, not =$"),
        (["EXIT.LAYERS", "8"], r"unknown key EXIT \(did you mean 'EXITS'\?\)"),
        (["SEED.A", "8"], "SEED expects a whole number .*got {'A': 8}"),
        (["XYZ.WIDTH", "8"], "unknown key XYZ; the top level has OUTPUT_DIR, SEED"),
        (["MODEL.WIDTH", "wide"], "command line: MODEL.WIDTH expects a number"),
        (["EXITS.LAYERS", "[99]"], "^command line: EXITS.LAYERS is 99, expected"),
    ],
)
def test_invalid_overrides(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "mine.yaml", "SEED: 1"), overrides)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("EXITS.LAYERS", "(8, 12)", (8, 12)),
        ("EXITS.LAYERS", "[8]", (8,)),
        ("EXITS.LAYERS", "8", (8,)),
        ("EXITS.LAYERS", "(8,)", (8,)),
        ("BASELINE.LR", "1e-3", 0.001),
        ("ROUTING.THRESHOLDS", "[1e-1, 2.5E-1]", (0.1, 0.25)),
        ("MODEL.WIDTH", "1", 1.0),
        ("SEED", "1000000", 1000000),
        ("ENGINE.AMP", "off", "off"),
        ("ENGINE.AMP", "'off'", "off"),
        ("OUTPUT_DIR", "2024-01-01", "2024-01-01"),
        ("OUTPUT_DIR", "[runs", "[runs"),
        ("OUTPUT_DIR", "runs/try #2", "runs/try #2"),
        ("OUTPUT_DIR", "#2", "#2"),
        ("OUTPUT_DIR", "'runs' # first", "runs"),
        ("OUTPUT_DIR", "~/runs", os.path.expanduser("~/runs")),
        ("SEED", "3 # as before", 3),
        ("MODEL.WEIGHTS", "", ""),
        ("DATA.CLASSES", "[2024-13-45, &a chair, 'x']", ("2024-13-45", "chair", "x")),
    ],
)
def test_values_on_the_command_line(key, text, expected):
    section, _, name = key.rpartition(".")
    cfg = load_config(None, [key, text])
    value = (cfg[section] if section else cfg)[name]
    assert value == expected and type(value) is type(expected)


def test_output_dir_auto_is_the_name_of_the_file_and_off_is_text(tmp_path):
    cfg = load_config(write(tmp_path / "mine.yaml", "ENGINE: {AMP: OFF}"), ["OUTPUT_DIR", "auto"])
    assert (cfg.OUTPUT_DIR, cfg.ENGINE.AMP) == ("output/mine", "off")
