import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    assert cfg.OUTPUT_DIR == "output/mine"
    assert cfg.EXITS.DEPTH == get_cfg().EXITS.DEPTH


def test_dumped_configuration_loads_again(tmp_path):
    cfg = load_config(None, ["DATA.DATASETS", "[[mine, a.json, photos]]", "OUTPUT_DIR", "x"])
    assert load_config(write(tmp_path / "again.yaml", cfg.dump())) == cfg


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
        ("[1, 2]", "expected KEY: value lines"),
        ("a: [", "not valid YAML"),
        ("_BASE_: none.yaml", "no such configuration file"),
        ("_BASE_: bad.yaml", "circular _BASE_; remove it"),
    ],
)
def test_invalid_keys_and_types_are_one_line_errors(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(tmp_path / "bad.yaml", text))
    assert "\n" not in str(error.value)


BOMB = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
MERGES = "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
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
def test_hostile_yaml_is_a_short_one_line_error(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(tmp_path / "bad.yaml", text))
    assert str(error.value).isprintable() and len(str(error.value)) < 300


def test_dates_are_text_and_anchors_work():
    cfg = load_config(None, ["OUTPUT_DIR", "2024-01-01", "DATA.CLASSES", "[2024-13-45, &a chair, 'x']"])
    assert (cfg.OUTPUT_DIR, cfg.DATA.CLASSES) == ("2024-01-01", ("2024-13-45", "chair", "x"))


def test_too_long_chain_of_base_files(tmp_path):
    for number in range(1100):
        write(tmp_path / f"{number}.yaml", f"_BASE_: {number + 1}.yaml")
    with pytest.raises(ConfigError, match="a chain of more than 20 _BASE_ files; merge some of them"):
        load_config(tmp_path / "0.yaml")


def test_paths_that_are_not_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, message in (
        (tmp_path / "pipe.yaml", "not a regular file"),
        (tmp_path, "not a regular file"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(ConfigError, match=f"cannot be read as a configuration file .*{message}"):
            load_config(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SEED"], "the last key 'SEED' has no value"),
        (["EXIT.LAYERS", "8"], r"unknown key EXIT \(did you mean 'EXITS'\?\)"),
        (["SEED.A", "8"], "SEED expects a whole number .*got {'A': 8}"),
        (["XYZ.WIDTH", "8"], "unknown key XYZ; the top level has OUTPUT_DIR, SEED"),
        (["MODEL.WIDTH", "wide"], "command line: MODEL.WIDTH expects a number"),
    ],
)
def test_invalid_overrides(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize(("text", "expected"), [("(8, 12)", (8, 12)), ("[8]", (8,)), ("8", (8,)), ("(8,)", (8,))])
def test_lists_on_the_command_line(text, expected):
    assert expected == load_config(None, ["EXITS.LAYERS", text]).EXITS.LAYERS


def test_numbers_in_notations_that_yaml_reads_as_another_type():
    assert load_config(None, ["BASELINE.LR", "1e-3"]).BASELINE.LR == 0.001
    assert isinstance(load_config(None, ["MODEL.WIDTH", "1"]).MODEL.WIDTH, float)


@pytest.mark.parametrize("text", ["off", "OFF", "'off'"])
def test_off_is_text(tmp_path, text):
    assert load_config(None, ["ENGINE.AMP", text.lower()]).ENGINE.AMP == "off"
    assert load_config(write(tmp_path / "amp.yaml", f"ENGINE: {{AMP: {text}}}")).ENGINE.AMP == "off"


def test_invalid_value_error_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"mine.yaml: EXITS.LAYERS is 99, expected"):
        load_config(write(tmp_path / "mine.yaml", "EXITS: {LAYERS: [99]}"))


def test_invalid_override_error_names_the_command_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^command line: EXITS.LAYERS is 99, expected"):
        load_config(write(tmp_path / "mine.yaml", "SEED: 1"), ["EXITS.LAYERS", "[99]"])


def test_output_dir_auto_is_the_name_of_the_file(tmp_path):
    path = write(tmp_path / "mine.yaml", "SEED: 1")
    assert load_config(path, ["OUTPUT_DIR", "auto"]).OUTPUT_DIR == "output/mine"


@given(st.integers(0, 10**6))
def test_any_seed_is_valid(seed):
    assert seed == load_config(None, ["SEED", str(seed)]).SEED
