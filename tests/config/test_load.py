import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlyexit_ssd.config import get_cfg, load_config
from earlyexit_ssd.errors import ConfigError


def write(path, text):
    path.write_text(text)
    return path


def test_file_over_base_over_defaults_and_overrides_last(tmp_path):
    write(tmp_path / "base.yaml", "SEED: 3\nMODEL: {WIDTH: 0.5, IMAGE_SIZE: 160}\n")
    path = write(tmp_path / "mine.yaml", "_BASE_: base.yaml\nMODEL: {WIDTH: 0.75}\nEXITS: {LAYERS: [6, 12]}\n")
    cfg = load_config(path, ["EXITS.CHANNELS", "32", "DATA.CLASSES", "[chair]"])
    assert (cfg.SEED, cfg.MODEL.WIDTH, cfg.MODEL.IMAGE_SIZE) == (3, 0.75, 160)
    assert (cfg.EXITS.LAYERS, cfg.EXITS.CHANNELS, cfg.DATA.CLASSES) == ((6, 12), 32, ("chair",))
    assert cfg.OUTPUT_DIR == "output/mine"
    assert cfg.EXITS.DEPTH == get_cfg().EXITS.DEPTH


def test_a_dumped_configuration_loads_again(tmp_path):
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
        ("_BASE_: bad.yaml", "goes in a circle"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(tmp_path / "bad.yaml", text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SEED"], "the last key 'SEED' has no value"),
        (["EXIT.LAYERS", "8"], r"unknown key EXIT \(did you mean 'EXITS'\?\)"),
        (["SEED.A", "8"], "unknown key SEED.A: SEED is a value, no key is below it"),
        (["XYZ.WIDTH", "8"], "unknown key XYZ; the top level has OUTPUT_DIR, SEED"),
        (["MODEL.WIDTH", "wide"], "command line: MODEL.WIDTH expects a number"),
    ],
)
def test_mistakes_on_the_command_line(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize(("text", "expected"), [("(8, 12)", (8, 12)), ("[8]", (8,)), ("8", (8,)), ("(8,)", (8,))])
def test_lists_on_the_command_line(text, expected):
    assert expected == load_config(None, ["EXITS.LAYERS", text]).EXITS.LAYERS


def test_numbers_that_yaml_reads_as_text():
    assert load_config(None, ["BASELINE.LR", "1e-3"]).BASELINE.LR == 0.001
    assert isinstance(load_config(None, ["MODEL.WIDTH", "1"]).MODEL.WIDTH, float)


@pytest.mark.parametrize("text", ["off", "OFF", "'off'"])
def test_off_is_a_word(tmp_path, text):
    assert load_config(None, ["ENGINE.AMP", text.lower()]).ENGINE.AMP == "off"
    assert load_config(write(tmp_path / "amp.yaml", f"ENGINE: {{AMP: {text}}}")).ENGINE.AMP == "off"


def test_impossible_values_name_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"mine.yaml: EXITS.LAYERS is 99, expected"):
        load_config(write(tmp_path / "mine.yaml", "EXITS: {LAYERS: [99]}"))


def test_impossible_values_of_the_command_line_are_not_the_file_s(tmp_path):
    with pytest.raises(ConfigError, match=r"^command line: EXITS.LAYERS is 99, expected"):
        load_config(write(tmp_path / "mine.yaml", "SEED: 1"), ["EXITS.LAYERS", "[99]"])


def test_auto_is_the_name_of_the_file_wherever_it_is_said(tmp_path):
    path = write(tmp_path / "mine.yaml", "SEED: 1")
    assert load_config(path, ["OUTPUT_DIR", "auto"]).OUTPUT_DIR == "output/mine"


@given(st.integers(0, 10**6))
def test_any_seed(seed):
    assert seed == load_config(None, ["SEED", str(seed)]).SEED
