"""The report page: its content, and its behaviour in a browser."""

import base64
import dataclasses
import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from earlyexit_ssd.calibration.thresholds import choose
from earlyexit_ssd.evaluation.matches import ap_of_choice, exit_matches, photo_counts
from earlyexit_ssd.evaluation.results import Results
from earlyexit_ssd.modeling import Architecture
from earlyexit_ssd.report.page import (
    Page,
    Tile,
    evaluation_page,
    never_failing,
    search_page,
    training_page,
    training_section,
    verdict_sentence,
    write_page,
)
from earlyexit_ssd.report.page_photos import (
    CHANNEL_ATTENTION,
    GRADIENTS,
    OpenCosts,
    PagePhotos,
    attention_maps,
    attention_pictures,
    photos_json,
)
from tests.evaluation.conftest import build_found, build_ground_truth, build_random_case

EXITS = ("exit8", "exit12", "full")
COSTS = [
    OpenCosts((True, True), (10.0, 22.0, 45.0), (1.0, 2.5, 4.25)),
    OpenCosts((True, False), (10.0, 22.0, 42.0)),
    OpenCosts((False, True), (8.0, 18.0, 41.0)),
    OpenCosts((False, False), (8.0, 16.0, 38.0)),
]
EVIL = "<Script>window.evil = 1</Script><img src=x onerror='window.evil = 1'>.jpg"


def page_photos(truth, detections, confidences, thresholds=(0.5, 0.5), **more) -> PagePhotos:
    matches = exit_matches(truth, detections)
    known = {"plain_mmacs": 38.0, "plain_ms": 4.0, "score": 0.4}
    return PagePhotos(truth, matches, EXITS, confidences, thresholds, COSTS, **{**known, **more})


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> PagePhotos:
    """40 photos with random objects and detections. Photo 1 has a file; the name of photo 2 is a script in HTML."""
    (truth, first), (_, second), (_, third) = (build_random_case(seed, images=40) for seed in (1, 2, 3))
    folder = tmp_path_factory.mktemp("photos")
    for image_id, image in truth.imgs.items():
        image["file_name"] = f"photo{image_id}.jpg"
    truth.imgs[1]["file_name"] = str(folder / "there.jpg")
    truth.imgs[2]["file_name"] = EVIL
    Image.new("RGB", (640, 640), (90, 120, 60)).save(folder / "there.jpg")
    deeper = {key: {k: torch.cat([third[key][k], first[key][k]]) for k in first[key]} for key in first}
    confidences = np.random.default_rng(0).random((2, 40)).astype(np.float32)
    return page_photos(truth, [second, deeper, first], confidences)


def test_content_of_a_photo():
    """Two cats. The first exit finds one, and two false positives (a dog, a cat). The full path finds both cats."""
    box, far = (10, 10, 110, 110), (300, 300, 500, 600)
    truth = build_ground_truth(2, [(1, 1, box), (1, 1, far)])
    shallow = {
        1: build_found((2, 0.7, far), (1, 0.9, box), (1, 0.5, (400, 10, 500, 60)), (1, 0.3, far)),
        2: build_found(),
    }
    full = {1: build_found((1, 0.8, far), (1, 0.9, box)), 2: build_found()}
    content = photos_json(page_photos(truth, [shallow, shallow, full], np.array([[0.9, 0.1], [0.2, 0.6]])))
    assert content["hits"] == [[1, 1, 2], [0, 0, 0]] and content["false"] == [[2, 2, 0], [0, 0, 0]]
    assert content["objects"] == [2, 0] and content["classes"] == ["cat", "dog"]
    shown = [[10, 10, 110, 110, 0, 90, 1], [300, 300, 500, 600, 1, 70, 0], [400, 10, 500, 60, 0, 50, 0]]
    assert content["found"][0][0] == shown
    assert content["found"][0][2] == [[10, 10, 110, 110, 0, 90, 1], [300, 300, 500, 600, 0, 80, 1]]
    assert content["truth"] == [[[10, 10, 110, 110, 0, 0], [300, 300, 500, 600, 0, 0]], []]
    groups = {group["title"]: {bin["label"]: bin["photos"] for bin in group["bins"]} for group in content["groups"]}
    assert groups["number of objects"] == {"0": [1], "2": [0]} and groups["class shown"] == {"cat": [0]}
    assert groups["crowding: largest IoU of two objects"] == {"under 0.01": [0]}
    # sides of 100 and sqrt(60000) = 245 pixels in a photo of 640: the median is 0.27
    assert groups["typical size of an object, share of the side"] == {"20% to 40%": [0]}
    assert content["curve"][0]["AP50"] == 1.0  # the full path: the point with the highest cost


def test_detector_without_early_exits_has_no_curve():
    truth, found = build_random_case(0, images=3)
    matches = exit_matches(truth, [found])
    photos = PagePhotos(truth, matches, ("full",), np.array([]), (), [OpenCosts((), (38.0,))], None, None, 0.4)
    content = photos_json(photos)
    assert content["curve"] == content["confidences"] == [] and np.shape(content["hits"]) == (3, 1)


def test_verdict_sentence_names_what_to_ship(metrics):
    assert verdict_sentence(Results.from_json(metrics)) == (
        "Ship the exits: 1.43 times as fast as the detector without exits, AP50 0.650 against 0.720."
    )
    findings = [{"line": "a reason", "veto": True}, {"line": "ship instead: plain 256", "veto": True}]
    metrics["verdict"] = {"ship": False, "what": None, "findings": findings}
    assert verdict_sentence(Results.from_json(metrics)) == "Do not ship the routed detector. Ship instead: plain 256."


def tiles_of(page: Page) -> dict[str, Tile]:
    return {tile.name: tile for tile in page.tiles}


def test_first_screen_of_an_evaluation(with_rivals):
    with_rivals["exits"][0]["ms"] = None
    page = evaluation_page(Results.from_json(with_rivals))
    tiles = tiles_of(page)
    assert tiles["speed-up"].value == "1.43×" and tiles["photos leave early"].value == "75.0 %"
    assert tiles["target of the calibration"].value == "none"
    names = [*EXITS, "routed", "without exits", "plain 256", "yolox_nano"]
    assert [row[0] for row in page.table[1:]] == names and [point.name for point in page.points] == names[1:]


@pytest.mark.parametrize(
    ("kind", "value", "interval", "kept", "words"),
    [
        ("ap_drop", 0.03, [0.0, 0.02], True, "kept"),
        ("ap_drop", 0.03, [0.0, 0.04], True, "kept, but not in the whole interval"),
        ("speedup", 1.5, [1.4, 1.7], True, "kept, but not in the whole interval"),
        ("speedup", 1.5, [1.5, 1.7], True, "kept"),
        ("speedup", 1.5, [1.2, 1.3], False, "not kept"),
    ],
)
def test_target_tile_compares_the_target_with_the_interval(with_rivals, kind, value, interval, kept, words):
    target = {"kind": kind, "value": value, "delta": 0.05}
    with_rivals["certificate"] = {"target": target, "measured": sum(interval) / 2, "interval": interval, "kept": kept}
    tile = tiles_of(evaluation_page(Results.from_json(with_rivals)))["target of the calibration"]
    assert tile.note.rpartition(": ")[2] == words and tile.good == kept


def test_search_is_compared_with_the_user_s_own_detector(with_rivals):
    """With the figures in 8 bits, if these are to be shipped, and not with those of the model."""
    objects = {"objects_found": 7, "objects_found_base": 9}
    test = {"AP50": 0.5, "AP50_base": 0.75, "ms": 2.0, "ms_base": 6.0, **objects}
    kinds = {
        "whole": ([], False, 5.0),
        "fast": (["exit8"], False, 2.0),
        "net": ([], True, 3.0),
        "untimed": ([], 0, None),
    }
    candidates = [{"name": n, "AP50": 0.5, "exits": e, "rival": r, "ms": ms} for n, (e, r, ms) in kinds.items()]
    outcome = {"candidates": candidates, "chosen": candidates[1], "summary": "ship it. reasons", "ship": True}
    page = search_page({**outcome, "test": test}, Results.from_json(with_rivals))
    assert {row.name: row.kind for row in page.points} == {"whole": "plain", "fast": "chosen", "net": "rival"}
    assert page.verdict == "Ship it: fast." and page.table[2] == ("fast", "0.500", "2.0", "chosen")
    tiles = tiles_of(page)
    assert (tiles["speed-up"].value, tiles["speed-up"].note) == ("3.00×", "2.0 ms, your detector 6.0")
    assert (tiles["AP50"].value, tiles["AP50"].note) == ("0.500", "your detector 0.750")
    assert tiles["objects found"].value == "7" and tiles["objects found"].note.endswith("; your detector finds 9")
    assert tiles["photos leave early"].value == "75.0 %" and page.good


def test_training_page_numbers_epochs_across_phases_and_names_the_failed_checks():
    losses = {"loss": 3.0, "loss/a": 1.0}
    measured = {"AP50/full": 0.5, "AP50/exit8": 0.25, "temperature/exit8": 3.0}
    logs = {
        "baseline": [{"step": 1, "epoch": 1.0, "loss": 5.0, "AP50/full": 0.5}],
        "exits": [{"step": 1, "epoch": 2.0, **losses, **measured}],
    }
    check = {"name": "exit8 AP50", "value": 0.25, "limit": 0.3, "of": "", "passed": False}
    gates = [{"phase": "exits", "passed": False, "forced": False, "checks": [check]}]
    section = training_section(logs, gates, (0.5, 3.0))
    charts = {chart.title: {line.name: (line.x, line.y) for line in chart.lines} for chart in section.charts}
    assert charts["AP50"] == {"full": ([1.0, 3.0], [0.5, 0.5]), "exit8": ([3.0], [0.25])}
    assert charts["temperature"]["bound 3"] == ([0, 3.0], [3.0, 3.0])
    assert charts["loss"] == {"total (baseline)": ([1.0], [5.0]), "total (exits)": ([3.0], [3.0])}
    assert charts["parts of the loss"] == {"a (exits)": ([3.0], [1.0])}
    assert section.table[1] == ("exits", "failed", "exit8 AP50 0.250 < 0.300")
    assert training_page(section, gates, "toy").verdict == "The gate of phase exits failed: exit8 AP50 0.250 < 0.300."


def test_error_in_a_page_is_a_warning(tmp_path, caplog):
    (tmp_path / "report.html").write_text("of an earlier job")
    with never_failing(tmp_path / "report.html"):
        raise KeyError("thumbnail")
    assert not (tmp_path / "report.html").exists()
    assert "report.html is not written (KeyError: 'thumbnail'); all other results are" in caplog.text


def test_page_fetches_nothing_and_escapes_names(photos, tmp_path):
    write_page(tmp_path / "report.html", Page("</title><b>", "<script>", photos=photos))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>&lt;/title&gt;&lt;b&gt;</title>" in text and ">&lt;script&gt;</h1>" in text and "evil" not in text
    assert not re.search(r"(src|href)=\"(http|//|file)", text) and "default-src 'none'" in text
    packed = re.search(r'id="data">([^<]*)<', text)[1]
    content = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert content["photos"]["files"][1] == EVIL and list(content["photos"]["thumbnails"]) == ["0"]


# In a browser.

CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]  # fmt: skip
MANY = 5000


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"no browser: {CHROMIUM} is missing (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=str(CHROMIUM), args=OPTIONS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def shown(browser, photos, tmp_path_factory):
    """The page in a window of 400 pixels, and a list of its errors and requests."""
    path, errors = tmp_path_factory.mktemp("page") / "report.html", []
    section = training_section({"exits": [{"step": 1, "epoch": 1.0, "loss": 5.0, "AP50/exit8": 0.5}]}, [])
    write_page(path, Page("toy", "Ship it.", True, photos=photos, sections=(section,), command="calibrate {target}"))
    tab = browser.new_page(viewport={"width": 400, "height": 800})
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: errors.append(request.url) if request.url.startswith("http") else None)
    tab.goto(path.as_uri())
    tab.wait_for_selector("body[data-ready]")
    return tab, errors


def value(tab, key):
    text = tab.get_attribute(f'[data-key="{key}"]', "data-value")
    return None if text is None else float(text)


@pytest.mark.parametrize("thresholds", [(0.5, 0.5), (0.9, 0.2), (2.0, 0.731), (0.0, 0.3), (2.0, 2.0), (0.25, 2.0)])
def test_explorer_shows_the_figures_that_python_computes(shown, photos, thresholds):
    tab, _ = shown
    for name, threshold in zip(EXITS[:2], thresholds, strict=True):
        box = tab.get_by_label(f"threshold of {name}, number")
        box.fill("" if threshold == 2 else str(threshold))
        box.dispatch_event("change")
    choice = choose(photos.confidences, thresholds).astype(int)
    counts, every = photo_counts(photos.matches, photos.score), np.arange(40)
    for index, name in enumerate(EXITS):
        assert value(tab, f"share/{name}") == (choice == index).mean()
    assert value(tab, "ap50") == pytest.approx(ap_of_choice(photos.matches, choice, ap50_only=True).AP50, abs=1e-12)
    hits, false = counts.true_positives, counts.false_positives
    assert value(tab, "found") == hits[every, choice].sum()
    assert value(tab, "lost") == np.maximum(hits[:, -1] - hits[every, choice], 0).sum()
    assert value(tab, "added") == np.maximum(false[every, choice] - false[:, -1], 0).sum()
    opened = tuple(threshold < 2 for threshold in thresholds)
    costs = next(costs for costs in COSTS if costs.opened == opened)
    assert value(tab, "mmacs") == pytest.approx(np.array(costs.mmacs)[choice].mean(), rel=1e-12)
    assert value(tab, "ms") == (costs.ms and pytest.approx(np.array(costs.ms)[choice].mean(), rel=1e-12))
    assert value(tab, "changed") == (choice != choose(photos.confidences, (0.5, 0.5))).sum()


def test_page_works_by_keyboard_in_a_narrow_window_and_prints(shown, photos):
    tab, errors = shown
    tab.get_by_role("button", name="as evaluated").press("Enter")
    before = value(tab, "share/exit8")
    tab.get_by_label("threshold of exit8", exact=True).press("End")
    assert value(tab, "share/exit8") == 1.0 > before
    tab.get_by_label("which photos").select_option(index=4)
    empty = int((photos.matches.objects == 0).sum())
    assert tab.locator("#photos .note").nth(1).inner_text().startswith(f"{empty} of 40 photos")
    assert tab.locator("article").count() == min(empty, 12)
    tab.get_by_label("which photos").select_option(index=0)
    tab.get_by_label("file name").fill("<SCRIPT>")
    assert EVIL in tab.inner_text("article") and tab.locator("article").count() == 1
    assert tab.evaluate("window.evil === undefined && document.documentElement.scrollWidth <= 400")
    tab.emulate_media(media="print")
    assert not tab.locator("nav").is_visible() and tab.locator("#verdict").is_visible()
    assert len(tab.pdf()) > 10_000
    assert errors == []


def test_5000_photos_make_a_small_file_and_fast_answers(browser, photos, tmp_path, monkeypatch):
    """Each photo has 100 detections at every exit. Their boxes are not drawn, which would take most of the time."""
    monkeypatch.setattr("earlyexit_ssd.report.page_photos.MAX_BOXES", 0)
    generator, repeats = np.random.default_rng(0), MANY // 40
    count = len(EXITS) * MANY * 100
    scores = np.sort(generator.random(count) ** 4)[::-1]
    photo, exit = generator.integers(MANY, size=count), generator.integers(3, size=count)
    hit = (generator.random(count) < 0.02) & (scores > 0.3)
    hit, zeros = np.tile(hit, (len(photos.matches.true_positive), 1)), np.zeros(count, int)
    objects = {"all": np.tile(photos.matches.objects_by_size["all"][:1], repeats) + 3}
    every = {"photo": photo, "exit": exit, "label": zeros, "rank": zeros, "score": scores, "overlap": scores}
    every |= {
        "box": np.zeros((4, count)),
        "true_positive": hit,
        "false_positive": ~hit,
        "classes": ["cat"],
        "objects_by_size": objects,
    }
    matches = dataclasses.replace(photos.matches, **every, image_ids=list(range(1, MANY + 1)))
    truth = build_ground_truth(MANY, [])
    for image_id, image in truth.imgs.items():
        image["file_name"] = f"photo{image_id}.jpg"
    confidences = generator.random((2, MANY)).astype(np.float32)
    content = {"matches": matches, "ground_truth": truth, "confidences": confidences}
    path = tmp_path / "report.html"
    write_page(path, Page("many", "", photos=dataclasses.replace(photos, **content)))
    assert os.path.getsize(path) < 25e6
    tab = browser.new_page()
    tab.goto(path.as_uri())
    tab.wait_for_selector("body[data-ready]")
    times = """() => [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8].map((value) => {
        const box = document.querySelector("input[type=number]"), start = performance.now();
        box.value = value;
        box.dispatchEvent(new Event("change"));
        document.body.getBoundingClientRect();
        return performance.now() - start;
    })"""
    assert min(tab.evaluate(times)) < 200


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    exits = {"exit_layers": (4, 8, 12), "branch": ("light", "copied", "copied"), "empty": (12,)}
    return Architecture(classes=("cat",), image_size=96, width=0.25, channels=16, depth=(1,), **exits).build().eval()


def test_every_exit_with_a_head_has_a_map(model):
    maps = attention_maps(model, torch.rand(3, 60, 80))
    methods = {name: method for name, (method, _) in maps.items()}
    assert methods == {"exit4": CHANNEL_ATTENTION, "exit8": GRADIENTS, "full": GRADIENTS}
    for _, values in maps.values():
        assert values.dim() == 2 and values.min() >= 0 and values.max() == pytest.approx(1.0, abs=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_map_of_a_light_branch_is_its_weighted_tap(model):
    image = torch.rand(3, 96, 96)
    branch, taps = model.branches["exit4"], []
    hook = branch.attention.register_forward_hook(lambda _, inputs, output: taps.append(output))
    values = attention_maps(model, image)["exit4"][1]
    hook.remove()
    expected = taps[-1][0].detach().abs().mean(0)
    torch.testing.assert_close(values, expected / expected.max())


def test_attention_pictures_have_the_shape_of_the_photo(model):
    (first, *_), photo = attention_pictures(model, [(7, torch.rand(3, 200, 480))]), torch.rand(3, 10, 10)
    assert first.photo == 7 and first.picture.size == (240, 100)
    assert len(attention_pictures(model, [(0, photo), (1, photo)])) == 6
