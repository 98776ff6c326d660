"""The command ``earlyexit``, and the scripts in tools/ that run its subcommands."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import earlyexit_command
from earlyexit_command import COMMANDS, main
from earlyexit_ssd.modeling import EarlyExitSSDLite_Weights

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {name: name for name in COMMANDS} | {"train": "train_net", "evaluate": "eval_exits"}
HELP = """
import importlib, resource, sys
from earlyexit_command import COMMANDS, main

tools = [importlib.import_module(f"tools.{name}").main for name in sys.argv[1:]]
for command in [main, *tools, *(lambda words, name=name: main([name, *words]) for name in COMMANDS)]:
    try:
        command(["--help"])
    except SystemExit as stop:
        assert stop.code == 0
heavy = {"torch", "torchvision", "numpy", "earlyexit_ssd"} & set(sys.modules)
assert not heavy, heavy
usage = resource.getrusage(resource.RUSAGE_SELF)
print("seconds:", usage.ru_utime + usage.ru_stime)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="measures CPU time as POSIX does")
def test_help_does_not_import_torch_and_is_fast():
    command = [sys.executable, "-c", HELP, "export_weights", *SCRIPTS.values()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("examples") >= 18
    assert float(result.stdout.split()[-1]) < 2  # all eighteen calls


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_with_the_name_of_the_command(name, capsys):
    script, examples = importlib.import_module(f"tools.{SCRIPTS[name]}").main, set()
    for call, arguments, prog in (
        (main, [name, "--help"], f"earlyexit {name}"),
        (script, ["--help"], f"python tools/{SCRIPTS[name]}.py"),
    ):
        with pytest.raises(SystemExit):
            call(arguments)
        text = capsys.readouterr().out
        assert text.startswith(f"usage: {prog} ") and text.partition("\nexamples")[2].count(f"  {prog} ") >= 2
        assert "%(" not in text and "%%" not in text
        examples.add(text.partition("\nexamples")[2].replace(prog, ""))
    assert len(examples) == 1


def test_command_passes_its_arguments_and_returns_the_exit_code(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: no such configuration file" in capsys.readouterr().err
    for words in ([], ["trian"], ["train"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
    assert "--config" in capsys.readouterr().err


def test_shipped_names_are_those_of_the_package():
    assert [name.lower() for name in EarlyExitSSDLite_Weights.__members__] == earlyexit_command.SHIPPED
    assert earlyexit_command.DEFAULT_WEIGHTS in earlyexit_command.SHIPPED


def test_wheel_has_the_command():
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    words = {word.arg: word.value for node in ast.walk(setup) if isinstance(node, ast.Call) for word in node.keywords}
    assert ast.literal_eval(words["py_modules"]) == ["earlyexit_command"]
    assert ast.literal_eval(words["entry_points"]) == {"console_scripts": ["earlyexit = earlyexit_command:main"]}


@pytest.mark.parametrize("arguments", [["optimize", "--config", "x.yaml"], ["export", "x.pth", "--out", "x.onnx"]])
def test_missing_pytorch_is_a_one_line_error(arguments):
    hide = "import sys; sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'fvcore'])); "
    code = f"{hide}import earlyexit_command; sys.exit(earlyexit_command.main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: earlyexit {arguments[0]} needs the package ") and len(line) < 300
