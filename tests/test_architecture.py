"""The house rules on imports and on the size of the tools."""

import ast
from pathlib import Path

from setuptools import find_packages

import earlyexit_ssd

PACKAGE = Path(earlyexit_ssd.__file__).parent
ORDER = [
    *("deploy", "config", "data", "modeling", "engine", "routing", "calibration", "evaluation", "doctor", "report"),
    "pipeline",
]
"""A folder imports from those before it. deploy imports none of the others."""
COMMON = {"bounds", "command_line", "drift", "errors", "files", "images", "plain", "progress", "runtimes"}


def imported_parts(path: Path) -> set[str]:
    """Return the folders and files of the package that a file imports."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    parts = [module.split(".") for module in modules]
    return {names[1] for names in parts if names[0] == "earlyexit_ssd" and len(names) > 1}


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
    for path in (PACKAGE / "deploy").glob("*.py"):
        assert imported_parts(path) <= {"deploy", *COMMON}, path
    for path in [*(PACKAGE / "deploy").glob("*.py"), *(PACKAGE / f"{name}.py" for name in COMMON)]:
        first = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Import)]
        names = {alias.name.split(".")[0] for node in first for alias in node.names}
        assert not names & {"torch", "torchvision", "scipy", "cv2"}, path


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
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(name.split(".")[0] == "benchmarks" for name in names), path
    assert all(name.split(".")[0] == "earlyexit_ssd" for name in distribution_packages())


def distribution_packages() -> list[str]:
    """Return the packages that setup.py puts into the wheel."""
    root = PACKAGE.parent
    call = next(
        node
        for node in ast.walk(ast.parse((root / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "find_packages"
    )
    return find_packages(str(root), **{word.arg: ast.literal_eval(word.value) for word in call.keywords})


def test_no_circular_imports():
    """Imports inside functions count too."""
    modules = {
        "earlyexit_ssd." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    imports: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = [
            f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in modules else node.module
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ]
        imports[name] = {module for module in found if module in modules}
    while leaves := [name for name, found in imports.items() if not found & imports.keys()]:
        for name in leaves:
            del imports[name]
    assert imports == {}
