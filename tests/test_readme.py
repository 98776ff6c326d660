"""The documents: tables match the metrics.json files, examples run, and links are valid."""

import json
import pkgutil
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from earlyexit_ssd.config import get_cfg, load_config
from earlyexit_ssd.data import load_dataset
from earlyexit_ssd.data.records import DATA_FORMATS
from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.evaluation.metrics import METRICS
from earlyexit_ssd.evaluation.results import Results
from earlyexit_ssd.evaluation.verdict import judge
from earlyexit_ssd.modeling import Architecture, Exit, load_model
from earlyexit_ssd.modeling.branches import BRANCHES
from earlyexit_ssd.modeling.detector import DETECTORS
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.pipeline.build import build_model
from earlyexit_ssd.pipeline.train import prepare
from earlyexit_ssd.routing.policies import POLICIES, get_policy

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
MEASURED = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| \[[^\]]+\]\((?:docs/)?results/(?P<run>\w+)/metrics\.json\) \| (?P<figures>.+) \|$", re.M)
RESULTS = sorted(ROOT.glob("docs/results/*/metrics.json"))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]
THREE_EXITS = ("voc_exit6", "voc_joint")


def read(run: str) -> dict:
    return json.loads((ROOT / "docs" / "results" / run / "metrics.json").read_text(encoding="utf-8"))


def interval(row: dict) -> str:
    """Return AP50 with its interval as text."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(row["AP50"], *row["AP50_interval"])


def cells(run: str) -> str:
    """Return the figures of a row from metrics.json."""
    metrics = read(run)
    rows = {row["name"]: row for row in metrics["exits"]}
    if run in THREE_EXITS:
        return " | ".join(interval(rows[name]) for name in ("full", "exit12", "exit8", "exit6"))
    routed, plain = metrics["routed"], metrics["without_exits"]
    verdict = f"ship {metrics['verdict']['what']}" if metrics["verdict"]["ship"] else "do not ship"
    figures = [interval(rows["full"]), interval(routed), f"{plain['ms']:.1f}", f"{routed['ms']:.1f}", verdict]
    better = [line for line in judge(Results.from_json(metrics)).lines if line.startswith("ship instead: ")]
    rivals = [rival for rival in metrics["rivals"] for line in better if f"instead: {rival['name']} has " in line]
    figures += ["{name}: {AP50:.3f} in {ms:.1f} ms".format(**rival) for rival in rivals] or ["-"]
    return " | ".join([str(metrics["context"]["images"]), *figures])


def lost(test: SimpleNamespace) -> str:
    """Return the loss of AP50 with its interval as text."""
    low, high = test.AP50_lost_interval
    return f"{round(test.AP50_base - test.AP50, 3) + 0.0:.3f} [{low:.3f}, {high:.3f}]"  # no -0.000


def times(test: SimpleNamespace) -> str:
    return f"{test.ms:.1f} ({test.ms_base:.1f}) | {test.ms_base / test.ms:.2f}"


def test_results_tables_match_metrics_json():
    rows = list(ROW.finditer(MEASURED))
    assert len(rows) == 5
    for row in rows:
        assert row["figures"] == cells(row["run"]), row.group()


def test_table_of_the_readme_matches_the_results():
    rows = re.findall(r"^\| \[[^\]]+\]\((docs/results/[\w/]+\.json)\) \| (.+) \|$", README, re.M)
    assert len(rows) == 5
    for file, figures in rows:
        measured = json.loads((ROOT / file).read_text(encoding="utf-8"))
        if "test" in measured:
            test, name = SimpleNamespace(**measured["test"]), measured["chosen"]["name"]
            verdict = "ship it" if measured["ship"] else "do not ship it"
        else:
            first, routed, full = measured["exits"][0], measured["routed"], measured["exits"][-1]
            test = SimpleNamespace(
                photos=measured["context"]["images"],
                AP50=routed["AP50"],
                AP50_base=full["AP50"],
                AP50_lost_interval=first["AP50_below_full_interval"],  # every photo leaves at the first exit
                ms=routed["ms"],
                ms_base=measured["without_exits"]["ms"],
            )
            assert routed["exit_share"][first["name"]] == 1
            name = f"routed, {measured['rivals'][0]['input_size'][0]} px"
            verdict = f"ship {measured['verdict']['what']}"
        ap50 = f"{test.AP50:.3f} ({test.AP50_base:.3f})"
        assert figures == f"{test.photos} | {name} | {ap50} | {lost(test)} | {times(test)} | {verdict}", file


def test_readme_is_short():
    assert len(README.splitlines()) <= 110


def test_python_example_of_the_readme_runs(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("left at ")


@pytest.fixture
def extensions():
    """Run the examples of docs/extending.md, and unregister them after the test. Return the names that they define."""
    kept = [(registry, dict(registry)) for registry in (POLICIES, DATA_FORMATS, BRANCHES, METRICS, DETECTORS)]
    names: dict = {}
    first, *examples = re.findall(r"^```python\n(.*?)^```", EXTENDING, re.M | re.S)
    compile(first, "extending.md", "exec")  # it imports the user's module
    for example in examples:
        exec(compile(example, "extending.md", "exec"), names)
    yield names
    for registry, before in kept:
        registry.clear()
        registry.update(before)


def test_examples_of_policies_run(extensions):
    model, tap = extensions["model"], torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    with torch.inference_mode():
        assert 0 <= float(model([torch.rand(3, 64, 80)])[0]["exit_confidence"]) <= 1
    photos = SimpleNamespace(temperatures=[1.0], signals=lambda index: [ExitSignals(torch.zeros(2, 5, 2), tap)])
    quiet = get_policy("quiet_tap", POLICIES["quiet_tap"].fit(photos))
    assert quiet(ExitSignals(torch.zeros(2, 5, 2), tap), 0).tolist() == pytest.approx([0.880797, 0.119203])
    assert quiet(ExitSignals(torch.zeros(2, 5, 2)), 1).tolist() == [1, 1]


def test_example_of_a_data_format_runs(extensions, tmp_path, caplog):
    for photo in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / photo)
    lines = "a.png,1,2,11,22,cup\r\na.png,3,4,x,8,cup\n\nb.png\n../c.png,0,0,9,9,cup\nlost.png\n"
    (tmp_path / "train.csv").write_text(lines, encoding="utf-8-sig")
    sets = f"[[cups, '{tmp_path}/train.csv', '{tmp_path}']]"
    cfg = load_config(None, ["DATA.DATASETS", sets, "DATA.CLASSES", "[cup]"])
    first, second = load_dataset(cfg, "cups", labels="optional")
    assert first[1]["boxes"].tolist() == [[1, 2, 11, 22]] and first[1]["labels"].tolist() == [1]
    assert second[0].shape == (3, 30, 40) and not len(second[1]["boxes"])
    cfg = load_config(None, ["DATA.DATASETS", sets, "DATA.CLASSES", "[cup]", "DATA.ON_BAD", "skip"])
    assert [record.path.name for record in load_dataset(cfg, "cups", labels="optional").records] == ["b.png"]
    assert "cups: 1 x missing photo file" in caplog.text and "train.csv, line 2: " in caplog.text
    for damaged in (b"\xff\xfe", b"a.png\rb.png"):
        (tmp_path / "train.csv").write_bytes(damaged)
        with pytest.raises(DataError, match="train.csv.*save it as"):
            load_dataset(cfg, "cups")


def test_example_of_a_branch_runs(extensions, tmp_path):
    model = Architecture(classes=("cup",), width=0.25, exits=(Exit(8, "strided", {"channels": 16}),)).build()
    shallow, full = model.eval().exit_outputs([torch.rand(3, 320, 320)]).heads
    assert {key: value.shape for key, value in shallow.items()} == {key: value.shape for key, value in full.items()}
    model.save(tmp_path / "model.pth")
    del BRANCHES["strided"]
    with pytest.raises(EarlyExitError, match="'strided', expected .*; import that module .docs/extending"):
        load_model(tmp_path / "model.pth")


def test_example_of_a_metric_runs(extensions):
    detector = SimpleNamespace(matches=SimpleNamespace(score=[0.9, 0.5, 0.1], photos=2))
    assert METRICS["boxes_per_image"].measure(detector) == {"boxes_per_image": 1.5}


def test_example_of_a_detector_runs(extensions, tmp_path):
    """Exits are checked against the detector's own layers, and a checkpoint needs no names of torchvision's weights."""
    name = "ssdlite_mobilenet_v3_small"
    keys = ["MODEL.NAME", name, "MODEL.WIDTH", "0.5", "EXITS.LAYERS", "[5, 9, 11]", "DATA.CLASSES", "[cup]"]
    model, architecture = build_model(load_config(None, keys), ("cup",))
    photos = [torch.rand(3, 40, 60)]
    *_, full = model.eval().exit_outputs(photos).heads
    plain = architecture.build_detector().eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("branches.")})
    batch, _ = plain.transform(photos)
    for key, value in plain.head(list(plain.backbone(batch.tensors).values())).items():
        torch.testing.assert_close(full[key], value)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    keys += ["MODEL.WEIGHTS", str(tmp_path / "plain.pth")]
    loaded, _ = build_model(load_config(None, keys), ("cup",))
    loaded.save(tmp_path / "model.pth")
    assert type(loaded).from_pretrained(tmp_path / "model.pth").exit_names == ("exit5", "exit9", "exit11", "full")
    wrong = {"EXITS.LAYERS": "[5, 12]", "MODEL.WEIGHTS": "COCO_V1", "MODEL.WEIGHTS_BACKBONE": "IMAGENET1K_V9"}
    messages = ("from 1 to 11", "weights COCO_V1: no such file; torchvision's weights are none", "of IMAGENET1K_V1")
    for (key, value), message in zip(wrong.items(), messages, strict=True):
        with pytest.raises(EarlyExitError, match=message):
            prepare(load_config(None, [*keys, key, value]), None, torch.device("cpu"))


def test_network_picture_is_current():
    script: dict = {"__name__": "draw_network"}
    exec((ROOT / "docs" / "draw_network.py").read_text(encoding="utf-8"), script)
    assert (ROOT / "docs" / "network.svg").read_text(encoding="utf-8") == script["network"]()


@pytest.mark.parametrize("run", ["chair_stream", "zoo_voc_animals"])
def test_tables_of_rivals_match_metrics_json(run):
    """Rows are the exits, the routed detector and the rivals of a run, sorted by MMACs."""
    metrics = read(run)
    *early, full = metrics["exits"]
    plain = {**full, **metrics["without_exits"], "name": "without exits"}
    early = [row for row in early if not row.get("empty")]
    rows = [*early, {**metrics["routed"], "name": "**routed**"}, plain, *metrics["rivals"]]
    lines = [
        "| {name} | {AP:.3f} | {AP50:.3f} [{AP50_interval[0]:.3f}, {AP50_interval[1]:.3f}] | {mmacs:.0f} | {ms:.1f} |"
        "".format(**row)
        for row in sorted(rows, key=lambda row: row["mmacs"])
    ]
    assert "\n".join(lines) in MEASURED, "\n".join(lines)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_stored_verdicts_are_current(path):
    """Older files have no findings. Their ``ship`` must be the same today, unless they have no rivals."""
    metrics = json.loads(path.read_text(encoding="utf-8"))
    results = Results.from_json(metrics)
    stored, current = metrics["verdict"], judge(results).to_json()
    if "findings" in stored:
        assert stored == current
    else:
        assert current["ship"] is (stored["ship"] and bool(metrics["rivals"]))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, by GitHub's rule. Code blocks have no headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = (re.sub(r"\]\([^)]*\)", "]", line) for line in re.findall(r"^#+ (.+)$", text, re.M))
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_and_headings_are_valid(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        other = (page.parent / path).resolve() if path else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            wrong.append(target)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_config_keys_and_files_in_documents_exist(page):
    """The changelog may have keys that were removed."""
    text, tree = page.read_text(encoding="utf-8"), get_cfg()
    sections = "|".join(key for key, value in tree.items() if isinstance(value, dict))
    known = {f"{section}.{key}" for section in sections.split("|") for key in paths(tree[section])}
    keys = set(re.findall(rf"\b(?:{sections})(?:\.[A-Z_\d]+)+", text)) if page.name != "CHANGELOG.md" else set()
    files = set(re.findall(r"\b(?:tools|benchmarks|configs|tests|docs|earlyexit_ssd)/[\w/]+\.\w+", text))
    assert sorted(keys - known) + sorted(file for file in files if not (ROOT / file).exists()) == []


def paths(tree: dict) -> list[str]:
    """Return every key and section of a configuration as dotted names."""
    below = [f"{key}.{path}" for key, value in tree.items() if isinstance(value, dict) for path in paths(value)]
    return [*tree, *below]


def test_results_have_no_absolute_paths():
    stored = [path for folder in ("docs", "benchmarks") for path in (ROOT / folder / "results").rglob("*.json")]
    wrong = [path for path in stored if '"/' in path.read_text(encoding="utf-8")]
    assert wrong == []


def test_names_of_the_api_page_exist():
    names = re.findall(r"^::: (.+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    assert len(names) > 20 and all(map(pkgutil.resolve_name, names))


QUALITY = (
    *("AP", "AP50", "AP75", "AP_interval", "AP50_interval", "AP_small", "AP_medium", "AP_large", "per_class"),
    *("precision", "recall", "f1", "false_positives_per_image", "false_positives_per_empty_image"),
    *("localization_error", "true_positives", "false_positives", "false_negatives"),
)
DOCUMENTED = {
    "exits": (*QUALITY, "name", "layer", "confidence", "mmacs", "ms", "ms_interval"),
    "routed": (*QUALITY, "policy", "thresholds", "exit_share", "ms", "mmacs", "speedup"),
    "rivals": (
        *QUALITY,
        *("name", "source", "kind", "input_size", "runtime", "mmacs", "ms", "ms_interval"),
        "routed_minus_rival_AP50_interval",
    ),
    "without_exits": ("mmacs", "ms", "ms_interval"),
    "context": (
        *("splits", "images", "empty_images", "classes", "score", "iou", "runs", "threads", "resamples", "seed"),
        *("runtime", "device", "torch", "torchvision", "forced", "weights_sha256"),
    ),
}
"""Keys of docs/metrics.md by the parts of metrics.json."""


@pytest.mark.parametrize("part", DOCUMENTED)
def test_keys_of_metrics_json_are_documented(part):
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [key for key in DOCUMENTED[part] if not re.search(rf"[`{{,]{key}[`.,}}]", text)] == []


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_stored_results_have_every_documented_key(path):
    metrics = json.loads(path.read_text(encoding="utf-8"))
    required = [(metrics["exits"][:-1], ("empty", "AP50_below_full_interval"))]
    for part, keys in DOCUMENTED.items():
        required.append((metrics[part] if isinstance(metrics[part], list) else [metrics[part]], keys))
    assert [(row.get("name"), key) for rows, keys in required for row in rows for key in keys if key not in row] == []
    for rival in metrics["rivals"]:
        assert rival["source"] is None or rival["source"] == Path(rival["source"]).name


SEARCH = re.compile(r"^\| \[[^\]]+\]\((?P<file>results/[\w/]+\.json)\) \| (?P<figures>[^|]+(?:\|[^|]+){4}) \|$", re.M)


def test_table_of_searches_matches_the_results():
    rows = list(SEARCH.finditer(MEASURED))
    assert len(rows) >= 5
    for row in rows:
        found = json.loads((ROOT / "docs" / row["file"]).read_text(encoding="utf-8"))
        test, name = SimpleNamespace(**found["test"]), found["chosen"]["name"]
        kept = f"{test.objects_found} ({test.objects_found_base})"
        assert row["figures"] == f"{name} | {times(test)} | {lost(test)} | {kept}", row.group()
