"""The house rules on imports and on the size of the tools."""

import ast
from collections.abc import Iterable
from pathlib import Path

from setuptools import find_packages

import earlyexit_ssd

PACKAGE = Path(earlyexit_ssd.__file__).parent
ORDER = [
    *("deploy", "config", "data", "modeling", "engine", "routing", "calibration", "evaluation", "doctor", "report"),
    "pipeline",
]
"""A folder imports from those before it. deploy imports none of the others."""
COMMON = {"bounds", "console", "drift", "errors", "files", "images", "plain", "registry", "runtimes"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_by(nodes: Iterable[ast.AST]) -> list[list[str]]:
    """Return the modules that these statements import, each as the parts of its name."""
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return [name.split(".") for name in names]


def imported_parts(path: Path) -> set[str]:
    """Return the folders and files of the package that a file imports."""
    modules = imported_by(list(ast.walk(parsed(path))))
    return {names[1] for names in modules if names[0] == "earlyexit_ssd" and len(names) > 1}


def test_every_folder_is_in_the_order():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(ORDER)


def test_imports_go_one_way():
    wrong = []
    for position, part in enumerate(ORDER):
        allowed = {*ORDER[: position + 1], *COMMON}
        for path in (PACKAGE / part).rglob("*.py"):
            wrong += [f"{path.relative_to(PACKAGE)} imports {name}" for name in imported_parts(path) - allowed]
    assert wrong == []


def test_common_files_import_no_folder():
    assert all(not imported_parts(PACKAGE / f"{name}.py") & set(ORDER) for name in COMMON)


def test_deploy_and_common_files_do_not_import_pytorch():
    for path in [*(PACKAGE / "deploy").glob("*.py"), *(PACKAGE / f"{name}.py" for name in COMMON)]:
        at_import = {names[0] for names in imported_by(parsed(path).body)}
        assert not at_import & {"torch", "torchvision", "scipy", "cv2"}, path


def test_modeling_has_no_optimizer_and_evaluation_no_plots():
    for part, forbidden in (("modeling", "torch.optim"), ("evaluation", "matplotlib"), ("evaluation", "PIL")):
        for path in (PACKAGE / part).rglob("*.py"):
            assert forbidden not in path.read_text(encoding="utf-8"), path


def test_tools_are_short():
    for path in (PACKAGE.parent / "tools").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 120, path


def test_benchmarks_are_not_installed_and_not_imported():
    """The studies import the package. The package and its tools may not import them."""
    for folder in (PACKAGE, PACKAGE.parent / "tools"):
        for path in folder.rglob("*.py"):
            assert "benchmarks" not in {names[0] for names in imported_by(list(ast.walk(parsed(path))))}, path
    calls = [node for node in ast.walk(parsed(PACKAGE.parent / "setup.py")) if isinstance(node, ast.Call)]
    (call,) = (call for call in calls if getattr(call.func, "id", "") == "find_packages")
    arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    installed = find_packages(str(PACKAGE.parent), **arguments)
    assert installed and all(name.split(".")[0] == "earlyexit_ssd" for name in installed)


def test_no_circular_imports():
    """Imports inside functions count too."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = path
    imports: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = [
            f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in modules else node.module
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ]
        imports[name] = {module for module in found if module in modules}
    while leaves := [name for name, found in imports.items() if not found & imports.keys()]:
        for name in leaves:
            del imports[name]
    assert imports == {}
