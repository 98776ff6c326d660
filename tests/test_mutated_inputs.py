"""Valid files of every kind, damaged at random: each is accepted, or refused with a one-line error, without a hang.

``valid`` writes the files of a kind once. For each input, `damage_folder` damages a file in a copy of their folder, and
a function of the kind reads the copy.
"""

import contextlib
import copy
import functools
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx.parser
import pytest
import torch
import yaml
from google.protobuf import json_format
from PIL import Image

from benchmarks.compare_recipes import read_recipes
from earlyexit_ssd import EarlyExitSSDLite, ExitRouter
from earlyexit_ssd.calibration import DriftMonitor
from earlyexit_ssd.calibration import certificate as certificates
from earlyexit_ssd.calibration.certificate import Certificate, CertifiedCosts, CertifiedTarget, Measured
from earlyexit_ssd.config import load_config
from earlyexit_ssd.data import load_dataset, to_coco
from earlyexit_ssd.data.problems import MODES
from earlyexit_ssd.drift import DriftReference
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.onnx import OnnxDetector, count_onnx_mmacs
from earlyexit_ssd.images import PHOTO_SUFFIXES
from earlyexit_ssd.modeling import Architecture, retrofit
from earlyexit_ssd.modeling.checkpoint import FOLDER, read_description, save_model, weights_hash
from earlyexit_ssd.pipeline.run import RunFolder

SECONDS = 20
"""Time limit for an input, on a shared machine."""

PHOTO = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))
TINY = Architecture(("chair", "cat"), image_size=64, width=0.1, exit_layers=(8,), channels=8, depth=(0,))
SIZE = (60, 40)
SECRET = "secret/s.png"
# file names outside the data set's folder, and endless files; "ABSOLUTE" is replaced by the folder of the test
OUTSIDE = (f"../{SECRET}", f"../../{SECRET}", f"ABSOLUTE/{SECRET}", "../secret")
PATHS = (*OUTSIDE, "/dev/zero", "pipe.png", "", "..", "1.png")
DATES = ("2024-13-45", "2024-01-01", "12:30:99", "0x" + "f" * 5000, "1e999", "9" * 5000, ".nan", "-.inf", "~", "010")
TEXTS = (
    "", "x" * 10_000, "a\nb", "a\0b", "\ud800", "\x1b", "../../x", "/etc/passwd", "x" * 300 + ".png", "ﬀ\u202e",
    "%s {0}", "no", "Unspecified", "1", *DATES,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, -1e-320, 5e-324, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**400,
    float("nan"), float("inf"), -float("inf"), [], {}, [[]], [None], {"a": 1}, {"": None}, [1, "2", 3.0], [1, 2, 3, 4],
    *TEXTS,
)  # fmt: skip


def damage(tree: Any, rng: random.Random) -> Any:
    """Return a copy of a tree of dicts and lists with one to three changes of values, keys, order or depth."""
    root = [copy.deepcopy(tree)]
    for _ in range(rng.randint(1, 3)):
        places, todo = [], [root]  # (container, key or index) of every value
        while todo and len(places) < 4000:
            node = todo.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
            places += [(node, key) for key in keys]
            todo += [node[key] for key in keys]
        node, key = rng.choice(places[1:] or places)
        change = rng.randrange(9)
        if change == 0 and node is not root:
            del node[key]
        elif change == 1:
            other, place = rng.choice(places)
            node[key] = copy.deepcopy(other[place])
        elif change == 2:
            for _ in range(rng.choice((3, 40, 300))):
                node[key] = [node[key]]
        elif change == 3 and isinstance(node, dict):
            node[rng.choice((7, "x", f"{key} ", "__class__", "x" * 10_000, "a\nb"))] = node.pop(key)
        elif change == 4 and node is not root and isinstance(node, list):
            node.extend([copy.deepcopy(node[key])] * rng.choice((1, 3, 500)))
        elif change == 5 and isinstance(node[key], (int, float)):
            node[key] = node[key] * rng.choice((-1, 0, 1e-9, 1e9, 10**30))
        elif change == 6:
            node[key] = str(node[key])
        else:
            node[key] = rng.choice(PATHS if isinstance(node[key], str) and change == 7 else VALUES)
    return root[0]


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return the content with parts replaced, deleted, repeated, truncated or inserted."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        start = rng.randrange(len(data) + 1)
        part = slice(start, start + rng.choice((1, 4, 40)))
        odd = rng.choice((b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"&a ", b"[" * 2000, b"{"))
        changes = (part, b""), (part, rng.randbytes(4)), (slice(start, None), b"")
        inserted = (slice(start, start), odd), (slice(start, start), data[part] * 50)
        where, value = rng.choice((*changes, *inserted))
        data[where] = value
    return bytes(data)


BOMB = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
MERGES = "\n".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, 12))
YAML_PIECES = (
    "!!int x", "!!timestamp x", "!!float x", "!!bool x", "!!binary x", "!!python/object:os.system x", "!!set {a}",
    "!!omap [a]", "&a [*a]", "&a {x: *a}", "{? [1] : 2}", "{? {a: 1} : 2}", "[" * 1500, "{a: " * 1500, "? ", "- ",
    "{SEED: 1, SEED: 2}", "<<: 1", "!!int ''", *DATES, '"a\\0b"', '"\\ud800"', "'" + "x" * 10_000 + "'",
)  # fmt: skip


def hostile_tensor(value: torch.Tensor, rng: random.Random) -> Any:
    """Return a value that is invalid in place of this tensor of a state dict."""
    changes: tuple[Callable[[], Any], ...] = (
        lambda: value.to(rng.choice((torch.int64, torch.complex64, torch.bool, torch.float64, torch.float8_e4m3fn))),
        lambda: value.to("meta"), lambda: value.float().to_sparse(), lambda: value * float("nan"), lambda: value[None],
        lambda: value.flatten()[:0], lambda: torch.zeros(()), lambda: value.tolist(), lambda: rng.choice(VALUES),
        lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        lambda: torch.zeros(1).expand(10**6), lambda: value.flatten().float().requires_grad_(),
    )  # fmt: skip
    return rng.choice(changes)()


def damage_checkpoint(content: dict, rng: random.Random) -> Any:
    """Return the content with changes of a tensor, of a name, of the description, or with a deep structure."""
    rest, tensors = {key: value for key, value in content.items() if key != "model"}, dict(content["model"])
    key, change = rng.choice(sorted(tensors)), rng.randrange(6)
    if change == 0:
        tensors[key] = hostile_tensor(tensors[key], rng)
    elif change == 1:
        tensors[rng.choice((7, None, b"x", ("a",), f"module.{key}", "x" * 10_000, "a\nb"))] = tensors.pop(key)
    elif change == 2:
        knot: list[Any] = [1]
        for _ in range(40):
            knot = [knot, knot]
        rest[rng.choice(("info", "more", "architecture"))] = rng.choice((knot, {"classes": knot}, Namespace(a=1)))
    else:
        rest = damage(rest, rng)
    return {**rest, "model": tensors} if isinstance(rest, dict) else rest


def damage_text(text: str, rng: random.Random) -> str:
    """Return the text with changes of its words, lines and tags, sometimes with pieces of XML or paths."""
    words = re.split(r"(\s|<[^<>]*>)", text)
    if rng.random() < 0.5:
        pieces = XML_PIECES if "<" in text else [f"\n{path}\n" for path in (*PATHS, *TEXTS)]
        words.insert(rng.randrange(len(words)), rng.choice(pieces))
    words = damage(words, rng)
    return "".join(map(str, words)) if isinstance(words, list) else str(words)


def damage_json(text: str, rng: random.Random) -> str:
    """Damage the values, with Python's NaN, sometimes with a repeated key or too deep nesting. In most certificates the
    checksum is correct."""
    tree = damage(json.loads(text), rng)
    try:
        if isinstance(tree, dict) and certificates.CHECKSUM in tree and rng.random() < 0.8:
            tree[certificates.CHECKSUM] = certificates._checksum(json.loads(json.dumps(tree)))
        text = json.dumps(tree)
    except (ValueError, RecursionError):
        return "[" * 100_000
    if rng.random() < 0.1:
        key = rng.choice(text.split('"')[1::2] or ["a"])
        text = text.replace("{", f'{{"{key}": 1, ', 1)
    return text.replace(": ", ": " + '{"a":' * 5000, 1) if rng.random() < 0.05 else text


def damage_yaml(text: str, rng: random.Random) -> str:
    """Damage the values, with pieces of YAML for some values, sometimes with exponential aliases."""
    with contextlib.suppress(yaml.YAMLError, RecursionError, ValueError):
        text = yaml.safe_dump(damage(yaml.safe_load(text), rng), allow_unicode=True)
    lines = text.splitlines()
    if rng.random() < 0.5:
        at = rng.randrange(len(lines))
        lines[at] = f"{lines[at].partition(':')[0]}: {rng.choice(YAML_PIECES)}"
    if rng.random() < 0.1:
        lines += ["a0: &a0 [x]", BOMB, "SEED: *a11"] if rng.random() < 0.5 else ["m0: &m0 {x: 1}", MERGES]
    return "\n".join(lines) + "\n"


def damage_weights(content: bytes, rng: random.Random) -> bytes:
    damaged = io.BytesIO()
    with contextlib.suppress(Exception):  # some values cannot be saved
        torch.save(damage_checkpoint(torch.load(io.BytesIO(content), weights_only=True), rng), damaged)
        return damaged.getvalue()
    return damage_bytes(content, rng)


def damage_onnx(content: bytes, rng: random.Random) -> bytes:
    tree = json_format.MessageToDict(onnx.ModelProto.FromString(content))
    for _ in range(50):
        with contextlib.suppress(Exception):  # most damaged trees are no graph
            return json_format.ParseDict(damage(tree, rng), onnx.ModelProto()).SerializeToString()
    return damage_bytes(content, rng)


BY_SUFFIX: dict[str, Callable[[Any, random.Random], Any]] = {
    ".json": damage_json, ".yaml": damage_yaml, ".xml": damage_text, ".txt": damage_text, ".pth": damage_weights,
    ".onnx": damage_onnx,
}  # fmt: skip


def damage_folder(folder: Path, rng: random.Random) -> None:
    """Damage one file in a folder: its values, or its bytes, or it becomes a pipe, a folder, a link to itself or empty.
    Photos are damaged only if there are no other files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "secret" not in str(path))
    path = rng.choice([path for path in files if path.suffix not in PHOTO_SUFFIXES] or files)
    content, of_suffix = path.read_bytes(), BY_SUFFIX.get(path.suffix)
    if rng.random() < 0.03:
        path.unlink()
        rng.choice((lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to(path), lambda: path.touch()))()
        return
    if of_suffix is None or rng.random() < 0.2:
        content = damage_bytes(content, rng)
    elif path.suffix in (".pth", ".onnx"):
        content = of_suffix(content, rng)
    else:
        encoding = "utf-16" if rng.random() < 0.02 else "utf-8"
        text = of_suffix(content.decode(), rng)
        if rng.random() < 0.1:
            text = re.sub(r"[\w./]*\.png", lambda _: rng.choice(PATHS), text)
        content = text.encode(encoding, "surrogatepass")
    path.write_bytes(content.replace(b"ABSOLUTE", bytes(folder)))


# ---- valid files ----

CONFIG = {
    "SEED": 3,
    "DATA": {"TRAIN": ["a"], "CALIB": ["b"], "DATASETS": [["a", "x.json", "x"]], "CLASSES": ["chair"]},
    "MODEL": {"WIDTH": 0.5, "IMAGE_SIZE": 160, "SCORE_THRESH": 0.01},
    "EXITS": {"LAYERS": [6, 12], "EMPTY": [6], "COPY": [0.5]},
    "ROUTING": {"POLICY": "entropy", "THRESHOLDS": [0.5, 2], "TEMPERATURES": [1.0], "TEMPERATURE_BOUNDS": [0.5, 3.0]},
    "PHASES": ["baseline", "exits"],
    "EVAL": {"RIVALS": {"SIZES": [96], "ONNX": ["yolox:a.onnx"]}},
    "OUTPUT_DIR": "out",
}


# keys and values of the command line
OVERRIDES = "EXITS.LAYERS", "[6, 12]", "MODEL.WIDTH", "0.5", "OUTPUT_DIR", "out", "ROUTING.POLICY", "entropy"
COCO = {
    "images": [{"id": number, "file_name": f"{number}.png", "width": 60, "height": 40} for number in range(3)],
    "annotations": [
        {"id": 1, "image_id": 0, "category_id": 62, "bbox": [5, 6, 20, 30], "area": 500.0, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [30, 10, 10, 10], "ignore": 1, "difficult": 0},
    ],
    "categories": [{"id": 62, "name": "chair"}, {"id": 3, "name": "cat"}],
}


OBJECT = (
    "<object><name>{}</name><difficult>0</difficult>"
    "<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>25</xmax><ymax>36</ymax></bndbox></object>"
)
XML = (
    "<annotation><filename>0.png</filename><size><width>60</width><height>40</height></size>"
    f"{OBJECT.format('chair')}{OBJECT.format('sofa')}</annotation>"
)
XML_PIECES = (
    "<a>" * 3000, "<!DOCTYPE a [<!ENTITY b 'c'>]>", "&b;", "<?xml version='1.0' encoding='x'?>", "&amp;", "]]>", "<a/>",
    "&#0;", "CHAIR", "é", "\0",
)  # fmt: skip


YOLO = {"path": ".", "train": ["images/a", "list.txt"], "nc": 2, "names": {0: "chair", 1: "cat"}}
LABELS = "0 0.5 0.5 0.5 0.6\n1 0.25 0.5 0.5 0.2 0.75 0.5 0.5 0.8\n"
MODES_OF_PHOTOS = {"1.png": "RGB", "l.png": "L", "p.png": "P", "c.jpg": "CMYK", "a.webp": "RGBA"}
GATE = {"phase": "exits", "passed": True, "forced": False, "checks": []}
RECIPES = {"_ALL_": {"EXITS.DEPTH": [1]}, "thin": {"EXITS.COPY": [0.25]}}

# an ONNX detector of one box, whose score is the mean of a convolution
EXPORTED = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["": 13]>
    g (float[1, 3, 32, 32] image) => (float[1, 4] boxes, float[1] scores, int64[1] labels)
    <
        float[1, 3, 1, 1] weights = {0.1, 0.2, 0.3}, float[1, 4] corners = {1, 2, 30, 40},
        int64[1] label = {62}, int64[1] axis = {0}
    > {
        map = Conv <strides = [2, 2]> (image, weights)
        mean = GlobalAveragePool (map)
        flat = Flatten <axis = 0> (mean)
        scores = Squeeze (flat, axis)
        boxes = Identity (corners)
        labels = Identity (label)
    }
""")


@functools.cache
def model() -> EarlyExitSSDLite:
    torch.manual_seed(0)
    return TINY.build().eval()


def router() -> dict[str, Any]:
    inputs = model().exit_outputs([PHOTO]).taps[0].shape[1] + 1
    regression = {"weight": [0.0] * inputs, "bias": 0.0}
    return ExitRouter(1, policy="foreseen_emptiness", parameters=[regression]).to_dict()


def write_reference(path: Path) -> None:
    """Write a checkpoint of torchvision's reference training."""
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1}]}
    torch.save({"model": TINY.build_detector().state_dict(), "optimizer": optimizer, "epoch": 3}, path)


def write_certificate(path: Path) -> None:
    Certificate(
        router=router(),
        target=CertifiedTarget(
            kind="risk", epsilon=0.1, delta=0.05, bound="betting", reference="full", score=0.5, iou=0.5
        ),
        measured=Measured(photos=3, loss=0.1, exit_share={"exit8": 0.5, "full": 0.5}, speedup=1.2),
        cost_model=CertifiedCosts(unit="ms", exits=(1.0, 2.0), plain=1.9),
        weights_sha256=weights_hash(model()),
        photos_sha256=("ab" * 8, "cd" * 8),
        photo_list_sha256="ef",
        drift=DriftReference.from_decisions(("exit8", "full"), [0, 0, 1], [[0.9, 0.7, 0.2]]),
        versions={"torch": torch.__version__},
    ).save(path)


def valid(folder: Path, files: dict[str, Any]) -> None:
    """Write files (name -> content). A suffix or "*.png" as name stands for photos, a function writes its file."""
    for name, content in {SECRET: "RGB", "secret/s.xml": XML, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.stem == "*":
            for number in range(3):
                Image.new("RGB", SIZE, (number * 40, 90, 200)).save(path.with_stem(str(number)))
        elif path.suffix in PHOTO_SUFFIXES:
            Image.effect_noise(SIZE, 50).convert("RGB").convert(content).save(path)
        elif callable(content):
            content(path)
        else:
            dump = yaml.safe_dump if path.suffix == ".yaml" else json.dumps
            path.write_text(content if isinstance(content, str) else dump(content))


# ---- readers ----


def use_data(*entry: str) -> Callable[[Path], None]:
    """Return a function that reads every photo of an entry of DATA.DATASETS, for training and for evaluation. No photo
    may be outside the folder."""

    def use(folder: Path) -> None:
        os.mkfifo(next(folder.rglob("1.png")).with_name("pipe.png"))
        datasets = json.dumps([["tiny", *entry]])
        cfg = load_config(None, ["DATA.ROOT", str(folder), "DATA.TRAIN", "tiny", "DATA.DATASETS", datasets])
        cfg.defrost()
        cfg.DATA.ON_BAD = MODES[sum(map(ord, folder.name)) % 3]
        cfg.DATA.CLASSES = ("chair",) if not entry[0] else ()
        for train in (False, True):
            dataset = load_dataset(cfg, "tiny", train=train, labels="optional")
            for record in dataset.records:
                assert folder.name in str(record.path) and "secret" not in str(record.path), record.path
            assert len([dataset[index] for index in range(len(dataset))]) == len(to_coco(dataset).imgs)

    return use


@torch.no_grad()
def use_model(folder: Path) -> None:
    EarlyExitSSDLite.from_pretrained(folder / "model.pth")([PHOTO])


@torch.no_grad()
def use_reference(folder: Path) -> None:
    detector, *_ = retrofit(TINY, folder / "old.pth")
    detector.eval()([PHOTO])


@torch.no_grad()
def use_certificate(folder: Path) -> None:
    certificate = certificates.load_certificate(folder / "certificate.json")
    assert certificate.closed in (True, False)
    assert 0 <= certificate.target.score <= 1
    certificate.require_unseen([("a.jpg", "00" * 32)])
    DriftMonitor(certificate.drift).update([0] * 300, [0.5] * 300)
    try:
        model().router = certificate.router_for(model())
        model()([PHOTO])
    finally:
        model().router = None


def use_onnx(folder: Path) -> None:
    detector = OnnxDetector(folder / "rival.onnx", "boxes")
    detector([PHOTO])
    count_onnx_mmacs(detector.content)


def use_run(folder: Path) -> None:
    """Read the configuration of a run to resume. No configuration differs from itself."""
    cfg = load_config(None, ["OUTPUT_DIR", "x"])
    if folder.name == "valid":
        (folder / "config.yaml").write_text(cfg.dump())
    RunFolder(folder).require_free(cfg, resume=True)


def use_gate(folder: Path) -> None:
    run = RunFolder(folder)
    assert (run.finished("exits"), run.forced()) in itertools.product((True, False), repeat=2)


XMLS = {f"{n}.xml": XML.replace("0.png", f"{n}.png") for n in range(2)}
FILES: dict[str, dict[str, Any]] = {
    "configuration": {"c.yaml": {"_BASE_": "base.yaml", **CONFIG}, "base.yaml": {"THREADS": 1}},
    "COCO": {"photos/*.png": "", "coco.json": COCO},
    "VOC": {"photos/*.png": "", **{f"xml/{name}": text for name, text in XMLS.items()}},
    "devkit": {
        **{"V/JPEGImages/*.png": "", "V/ImageSets/Main/train.txt": "0\n1\n"},
        **{f"V/Annotations/{name}": text for name, text in XMLS.items()},
    },
    "YOLO": {
        **{"y/images/a/*.png": "", "y/images/b/*.png": "", "y/labels/a/0.txt": LABELS},
        **{"y/data.yaml": YOLO, "y/list.txt": "./images/b/2.png\n"},
    },
    "photos": {f"photos/{name}": mode for name, mode in MODES_OF_PHOTOS.items()},
    "certificate": {"certificate.json": write_certificate},
    "model": {"model.pth": lambda path: save_model(path, model(), TINY, {"forced": False, "router": router()})},
    "reference": {"old.pth": write_reference},
    "ONNX": {"rival.onnx": lambda path: path.write_bytes(EXPORTED.SerializeToString())},
    "gate": {"exits/gate.json": GATE},
    "run": {"config.yaml": CONFIG},
    "recipes": {"r.yaml": RECIPES},
    "description": {"d.json": next(FOLDER.glob("*.json")).read_text()},
}
# number of inputs, and the function that reads them
KINDS: dict[str, tuple[int, Callable[[Path], object]]] = {
    "configuration": (100, lambda folder: load_config(folder / "c.yaml")),
    "COCO": (250, use_data("coco.json", "photos")),
    "VOC": (200, use_data("xml", "photos")),
    "devkit": (80, use_data("V", "train")),
    "YOLO": (150, use_data("y/data.yaml", "train")),
    "photos": (100, use_data("", "photos")),
    "certificate": (80, use_certificate),
    "model": (30, use_model),
    "reference": (20, use_reference),
    "ONNX": (100, use_onnx),
    "gate": (20, use_gate),
    "run": (30, use_run),
    "recipes": (20, lambda folder: read_recipes(folder / "r.yaml")),
    "description": (20, lambda folder: read_description(folder / "d.json")),
}


class Hangs(BaseException):
    """Raised after the time limit. ``except Exception`` does not catch it."""


def stop(*_: object) -> None:
    raise Hangs(f"more than {SECONDS} s")


def outcome(use: Callable[[Path], object], folder: Path) -> str | None:
    """Return None if an input is accepted, "refused" if it is refused correctly, otherwise the wrong behaviour."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        use(folder)
    except EarlyExitError as error:
        message = str(error)
        return "refused" if message.isprintable() and 10 < len(message) < 300 else f"message {message!r}"
    except (Exception, Hangs) as error:
        return f"{type(error).__name__}: {error!s:.200}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_accepted_or_refused_in_one_line(name, tmp_path):
    inputs, use = KINDS[name]
    valid(tmp_path / "valid", FILES[name])
    before = signal.signal(signal.SIGALRM, stop)
    outcomes = {}
    try:
        for seed in [f"{name}{number}" for number in range(inputs)]:
            shutil.copytree(tmp_path / "valid", tmp_path / seed)
            damage_folder(tmp_path / seed, random.Random(seed))
            outcomes[seed] = outcome(use, tmp_path / seed)
        assert outcome(use, tmp_path / "valid") is None
    finally:
        signal.signal(signal.SIGALRM, before)
    wrong = {seed: text for seed, text in outcomes.items() if text not in (None, "refused")}
    assert not wrong, f"{len(wrong)} of {inputs}: {dict(list(wrong.items())[:10])}"
    assert "refused" in outcomes.values()


@pytest.mark.parametrize("seed", range(80))
def test_damaged_overrides_are_accepted_or_refused_in_one_line(seed):
    rng, words = random.Random(seed), list(OVERRIDES)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(words))
        changed = words[at] + ".X", words[at][1:], str(rng.choice(VALUES[:24])), "&a [x]"
        words[at] = rng.choice((*TEXTS, *YAML_PIECES, *changed))
    words = words[: rng.choice((8, 8, 7))]
    assert outcome(lambda _: load_config(None, words), Path()) in (None, "refused")


def test_there_are_at_least_1000_inputs():
    assert sum(inputs for inputs, _ in KINDS.values()) >= 1000
