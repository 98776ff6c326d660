"""Valid files of every kind, damaged at random: each is accepted, or refused with a one-line error, without a hang."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import os
import random
import re
import signal
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

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
from earlyexit_ssd.calibration.certificate import Certificate, load_certificate
from earlyexit_ssd.config import load_config
from earlyexit_ssd.data import load_dataset, to_coco
from earlyexit_ssd.data.problems import MODES
from earlyexit_ssd.drift import DriftReference
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.onnx import OnnxDetector, count_onnx_mmacs
from earlyexit_ssd.modeling import Architecture, retrofit
from earlyexit_ssd.modeling.checkpoint import FOLDER, read_description, weights_hash
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


def damage_text(text: str, rng: random.Random, *pieces: str) -> str:
    """Return the text with changes of its words, lines and tags. ``pieces`` may be inserted."""
    words = re.split(r"(\s|<[^<>]*>)", text)
    if pieces and rng.random() < 0.5:
        words.insert(rng.randrange(len(words)), rng.choice(pieces))
    words = damage(words, rng)
    return "".join(map(str, words)) if isinstance(words, list) else str(words)


def damage_bytes(content: bytes, rng: random.Random, share: float = 1.0) -> bytes:
    """Return the content, with this probability with parts replaced, deleted, repeated, truncated or inserted."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8)) if rng.random() < share else 0):
        start = rng.randrange(len(data) + 1)
        part = slice(start, start + rng.choice((1, 4, 40)))
        odd = rng.choice((b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"&a ", b"[" * 2000, b"{"))
        changes = (part, b""), (part, rng.randbytes(4)), (slice(start, None), b"")
        inserted = (slice(start, start), odd), (slice(start, start), data[part] * 50)
        where, value = rng.choice((*changes, *inserted))
        data[where] = value
    return bytes(data)


def as_json(tree: Any, rng: random.Random | None) -> bytes:
    """Return the tree as JSON with Python's NaN, damaged, sometimes with a repeated key or too deep nesting."""
    try:
        text = json.dumps(tree if rng is None else damage(tree, rng))
    except (ValueError, RecursionError):
        return b"[" * 100_000
    if rng and rng.random() < 0.1:
        key = rng.choice(text.split('"')[1::2] or ["a"])
        text = text.replace("{", f'{{"{key}": 1, ', 1)
    if rng and rng.random() < 0.05:
        text = text.replace(": ", ": " + '{"a":' * 5000, 1)
    return text.encode("utf-8", "surrogatepass")


BOMB = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
MERGES = "\n".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, 12))
YAML_PIECES = (
    "!!int x", "!!timestamp x", "!!float x", "!!bool x", "!!binary x", "!!python/object:os.system x", "!!set {a}",
    "!!omap [a]", "&a [*a]", "&a {x: *a}", "{? [1] : 2}", "{? {a: 1} : 2}", "[" * 1500, "{a: " * 1500, "? ", "- ",
    "{SEED: 1, SEED: 2}", "<<: 1", "!!int ''", *DATES, '"a\\0b"', '"\\ud800"', "'" + "x" * 10_000 + "'",
)  # fmt: skip


def as_yaml(tree: dict, rng: random.Random | None) -> bytes:
    """Return the tree as YAML, damaged, with pieces of YAML for some values, sometimes with exponential aliases."""
    try:
        lines = yaml.safe_dump(tree if rng is None else damage(tree, rng), allow_unicode=True).splitlines()
    except (yaml.YAMLError, RecursionError, ValueError):
        lines = ["SEED: 1"]
    if rng and rng.random() < 0.5:
        at = rng.randrange(len(lines))
        lines[at] = f"{lines[at].partition(':')[0]}: {rng.choice(YAML_PIECES)}"
    if rng and rng.random() < 0.1:
        lines += ["a0: &a0 [x]", BOMB, "SEED: *a11"] if rng.random() < 0.5 else ["m0: &m0 {x: 1}", MERGES]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


# ---- kinds of input: a valid file, a function that damages it, and a function that uses it ----


class Kind(NamedTuple):
    """``write`` puts a file into a folder, damaged with a random generator, or valid for None. ``use`` reads it."""

    inputs: int
    write: Callable[[Path, random.Random | None], Any]
    use: Callable[[Path, Any], object]


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


def write_config(folder: Path, rng: random.Random | None) -> None:
    """Write ``config.yaml`` over ``base.yaml``, sometimes over a long chain of files."""
    (folder / "base.yaml").write_text("THREADS: 1\n")
    base = "base.yaml"
    if rng and rng.random() < 0.02:
        for number in range(25):
            (folder / f"{number}.yaml").write_text(f"_BASE_: {number + 1}.yaml\n")
        base = "0.yaml"
    write(folder / "config.yaml", as_yaml({"_BASE_": base, **CONFIG}, rng), rng)


def write_overrides(folder: Path, rng: random.Random | None) -> list[str]:
    """Return keys and values of the command line."""
    parts = {part: keys for part, keys in CONFIG.items() if isinstance(keys, dict)}
    flat = [(f"{part}.{key}", value) for part, keys in parts.items() for key, value in keys.items()]
    pairs = [(key, json.dumps(value)) for key, value in flat if not isinstance(value, dict)]
    words = list(itertools.chain(*(rng.sample(pairs, 3) if rng else pairs)))
    for _ in range(rng.randint(1, 2) if rng else 0):
        at = rng.randrange(len(words))
        changed = words[at] + ".X", words[at][1:], str(rng.choice(VALUES[:24])), "&a [x]"
        words[at] = rng.choice((*TEXTS, *YAML_PIECES, *changed))
    return words[: rng.choice((6, 6, 5))] if rng else words


def write(path: Path, content: bytes | str, rng: random.Random | None, share: float = 0.3) -> None:
    """Write a file, with the probability ``share`` with damaged bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    path.write_bytes(damage_bytes(content, rng, share) if rng else content)


# ---- data sets: each function returns an entry of DATA.DATASETS ----


def write_set(root: Path, rng: random.Random | None, photos: str, contents: dict[str, bytes | str]) -> None:
    """Write the files of a data set and three photos, a photo outside the set, and a pipe."""
    for name, content in contents.items():
        write(root / name, content, rng, 0.1)
        (root / name).write_bytes((root / name).read_bytes().replace(b"ABSOLUTE", bytes(root)))
    for number, name in enumerate((*(f"{photos}/{number}.png" for number in range(3)), SECRET)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE, (number * 40, 90, 200)).save(root / name)
    os.mkfifo(root / photos / "pipe.png")


COCO = {
    "images": [{"id": number, "file_name": f"{number}.png", "width": 60, "height": 40} for number in range(3)],
    "annotations": [
        {"id": 1, "image_id": 0, "category_id": 62, "bbox": [5, 6, 20, 30], "area": 500.0, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [30, 10, 10, 10], "ignore": 1, "difficult": 0},
    ],
    "categories": [{"id": 62, "name": "chair"}, {"id": 3, "name": "cat"}],
}


def write_coco(folder: Path, rng: random.Random | None) -> tuple[str, str, str]:
    write_set(folder, rng, "photos", {"coco.json": as_json(COCO, rng)})
    return "tiny", "coco.json", "photos"


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


def write_xml(folder: Path, rng: random.Random | None) -> tuple[str, str, str]:
    """Write two XML files. The first is damaged, or has another encoding."""
    text = damage_text(XML, rng, *XML_PIECES) if rng else XML
    first = text.encode("utf-16" if rng and rng.random() < 0.05 else "utf-8", "surrogatepass")
    write_set(folder, rng, "photos", {"xml/0.xml": first, "xml/1.xml": XML.replace("0.png", "1.png")})
    return "tiny", "xml", "photos"


def write_devkit(folder: Path, rng: random.Random | None) -> tuple[str, str, str]:
    """Write a devkit. The list of the split is damaged, or is a folder."""
    lines = ["0", "1"]
    if rng is not None:
        lines += ["0 -1", *rng.sample((*TEXTS, *(name.removesuffix(".png") for name in PATHS)), 3)]
        rng.shuffle(lines)
    listing = "VOC/ImageSets/Main/train.txt"
    contents = {"secret/s.xml": XML, listing: "\n".join(lines), **{f"VOC/Annotations/{n}.xml": XML for n in range(2)}}
    if rng and rng.random() < 0.05:
        del contents[listing]
        (folder / listing).mkdir(parents=True)
    write_set(folder, rng, "VOC/JPEGImages", contents)
    return "tiny", "VOC", "train"


YOLO = {"path": ".", "train": ["images/a", "list.txt"], "nc": 2, "names": {0: "chair", 1: "cat"}}


def write_yolo(folder: Path, rng: random.Random | None) -> tuple[str, str, str]:
    """Write a YOLO data set in which data.yaml, a list of photos or a label file is damaged."""
    labels = "0 0.5 0.5 0.5 0.6\n1 0.25 0.5 0.5 0.2 0.75 0.5 0.5 0.8\n"
    contents = {"data.yaml": as_yaml(YOLO, None), "list.txt": "./images/b/2.png\n", "labels/a/0.txt": labels}
    damaged = rng.choice(sorted(contents)) if rng else None
    if damaged == "data.yaml":
        contents[damaged] = as_yaml(YOLO, rng)
    elif damaged:
        contents[damaged] = damage_text(contents[damaged], rng, *(f"\n{path}\n" for path in PATHS))
    write_set(folder, rng, "yolo/images/b", {})
    write_set(folder, rng, "yolo/images/a", {f"yolo/{name}": content for name, content in contents.items()})
    return "tiny", "yolo/data.yaml", "train"


def write_photo(folder: Path, rng: random.Random | None) -> tuple[str, str, str]:
    """Write photos. One of them has a random format, and is damaged, missing or not a regular file."""
    kinds = (("png", "RGB"), ("png", "L"), ("png", "P"), ("jpg", "CMYK"), ("bmp", "RGB"), ("webp", "RGBA"))
    suffix, mode = rng.choice(kinds) if rng else kinds[0]
    write_set(folder, rng, "photos", {})
    path = folder / "photos" / f"x.{suffix}"
    Image.effect_noise(SIZE, 50).convert("RGB").convert(mode).save(path)
    if rng and rng.random() < 0.1:
        path.unlink()
        rng.choice((lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to(path), lambda: path.touch()))()
    elif rng:
        write(path, path.read_bytes(), rng, 1.0)
    return "tiny", "", "photos"


def use_data(folder: Path, entry: tuple[str, str, str]) -> None:
    """Read every photo for training and for evaluation. No photo may be outside the folder."""
    cfg = load_config(None, ["DATA.ROOT", str(folder), "DATA.TRAIN", "tiny", "DATA.DATASETS", json.dumps([entry])])
    cfg.defrost()
    cfg.DATA.ON_BAD = MODES[sum(map(ord, folder.name)) % 3]
    cfg.DATA.CLASSES = ("chair",) if not entry[1] else ()
    for train in (False, True):
        dataset = load_dataset(cfg, "tiny", train=train, labels="optional")
        for record in dataset.records:
            assert folder.name in str(record.path) and "secret" not in str(record.path), record.path
        assert len([dataset[index] for index in range(len(dataset))]) == len(to_coco(dataset).imgs)


@functools.cache
def models() -> tuple[EarlyExitSSDLite, dict[str, dict[str, Any]]]:
    """Return a model with one exit, and the contents of its file, of a reference checkpoint and of its certificate."""
    torch.manual_seed(0)
    model = TINY.build().eval()
    inputs = model.exit_outputs([PHOTO]).taps[0].shape[1] + 1
    regression = {"weight": [0.0] * inputs, "bias": 0.0}
    router = ExitRouter(1, policy="foreseen_emptiness", parameters=[regression]).to_dict()
    content = {
        "format": "earlyexit_ssd/1",
        "architecture": TINY.to_dict(),
        "model": {key: value for key, value in model.state_dict().items() if not key.startswith("router.")},
        "info": {"phase": "exits", "forced": False, "router": router},
    }
    reference = {
        "model": TINY.build_detector().state_dict(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
    }
    target = {"kind": "risk", "epsilon": 0.1, "delta": 0.05, "bound": "betting", "reference": "full"}
    shares = {"exit8": 0.5, "full": 0.5}
    certificate = {
        "format": certificates.FORMAT,
        "router": router,
        "target": {**target, "score": 0.5, "iou": 0.5},
        "measured": {"photos": 3, "loss": 0.1, "AP50": None, "exit_share": shares, "speedup": 1.2},
        "cost_model": {"unit": "ms", "exits": [1.0, 2.0], "plain": 1.9, "measured": {}},
        "weights_sha256": weights_hash(model),
        "photos_sha256": ["ab" * 8, "cd" * 8],
        "photo_list_sha256": "ef",
        "drift": asdict(DriftReference.from_decisions(("exit8", "full"), [0, 0, 1], [[0.9, 0.7, 0.2]])),
        "versions": {"torch": torch.__version__},
    }
    return model, {"model": content, "old": reference, "certificate": json.loads(json.dumps(certificate))}


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


def damage_weights(content: dict, rng: random.Random) -> Any:
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


def write_weights(name: str, folder: Path, rng: random.Random | None) -> None:
    content, path = models()[1][name], folder / f"{name}.pth"
    try:
        torch.save(damage_weights(content, rng) if rng and rng.random() < 0.8 else content, path)
    except Exception:  # some values cannot be saved
        torch.save(content, path)
    write(path, path.read_bytes(), rng)


@torch.no_grad()
def use_model(folder: Path, _: None) -> None:
    EarlyExitSSDLite.from_pretrained(folder / "model.pth")([PHOTO])


@torch.no_grad()
def use_reference(folder: Path, _: None) -> None:
    detector, *_ = retrofit(TINY, folder / "old.pth")
    detector.eval()([PHOTO])


def write_certificate(folder: Path, rng: random.Random | None) -> None:
    """Write a certificate, in most cases with the correct checksum of its damaged content."""
    tree = models()[1]["certificate"] if rng is None else damage(models()[1]["certificate"], rng)
    if isinstance(tree, dict) and (rng is None or rng.random() < 0.8):
        with contextlib.suppress(Exception):  # without JSON there is no checksum
            plain = json.loads(json.dumps(tree))
            tree = {**tree, certificates.CHECKSUM: certificates._checksum(plain)}
    write(folder / "certificate.json", as_json(tree, None), rng, 0.1)


@torch.no_grad()
def use_certificate(folder: Path, _: None) -> None:
    certificate: Certificate = load_certificate(folder / "certificate.json")
    assert certificate.closed in (True, False)
    assert 0 <= certificate.target.score <= 1
    certificate.require_unseen([("a.jpg", "00" * 32)])
    DriftMonitor(certificate.drift).update([0] * 300, [0.5] * 300)
    model, _ = models()
    try:
        model.router = certificate.router_for(model)
        model([PHOTO])
    finally:
        model.router = None


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


def write_onnx(folder: Path, rng: random.Random | None) -> None:
    """Write the detector with damage of its graph and, sometimes, of its bytes."""
    tree = json_format.MessageToDict(EXPORTED)
    for _ in range(50):
        with contextlib.suppress(Exception):  # most damaged trees are no graph
            graph = json_format.ParseDict(damage(tree, rng) if rng else tree, onnx.ModelProto())
            return write(folder / "rival.onnx", graph.SerializeToString(), rng)
    raise AssertionError("no damaged tree is a graph")


def use_onnx(folder: Path, _: None) -> None:
    detector = OnnxDetector(folder / "rival.onnx", "boxes")
    detector([PHOTO])
    count_onnx_mmacs(detector.content)


def write_others(folder: Path, rng: random.Random | None) -> str:
    """Write another file of the package: configuration or gate of a run, description of weights, recipes."""
    name = rng.choice(sorted(OTHERS)) if rng else "gate"
    tree, suffix, _ = OTHERS[name]
    write(folder / f"file.{suffix}", (as_yaml if suffix == "yaml" else as_json)(tree, rng), rng)
    return name


def read_run(path: Path) -> None:
    """Read a file as the configuration of a run to resume."""
    run = RunFolder(path.parent / "run")
    run.root.mkdir()
    (run.root / "config.yaml").write_bytes(path.read_bytes())
    run.require_free(load_config(None, ["OUTPUT_DIR", "x"]), resume=True)


def read_gate(path: Path) -> None:
    """Read a file as the gate of a phase."""
    run = RunFolder(path.parent / "run")
    run.phase("exits").mkdir(parents=True)
    (run.phase("exits") / "gate.json").write_bytes(path.read_bytes())
    assert (run.finished("exits"), run.forced()) in itertools.product((True, False), repeat=2)


OTHERS: dict[str, tuple[Any, str, Callable[[Path], object]]] = {
    "gate": ({"phase": "exits", "passed": True, "forced": False, "checks": []}, "json", read_gate),
    "configuration": (CONFIG, "yaml", read_run),
    "recipes": ({"_ALL_": {"EXITS.DEPTH": [1]}, "thin": {"EXITS.COPY": [0.25]}}, "yaml", read_recipes),
    "description": (json.loads(next(FOLDER.glob("*.json")).read_text()), "json", read_description),
}


KINDS = {
    "configuration": Kind(100, write_config, lambda folder, _: load_config(folder / "config.yaml")),
    "overrides": Kind(80, write_overrides, lambda folder, words: load_config(None, words)),
    "COCO": Kind(250, write_coco, use_data),
    "VOC": Kind(200, write_xml, use_data),
    "devkit": Kind(50, write_devkit, use_data),
    "YOLO": Kind(150, write_yolo, use_data),
    "photos": Kind(100, write_photo, use_data),
    "certificate": Kind(80, write_certificate, use_certificate),
    "model": Kind(40, functools.partial(write_weights, "model"), use_model),
    "reference": Kind(30, functools.partial(write_weights, "old"), use_reference),
    "ONNX": Kind(100, write_onnx, use_onnx),
    "others": Kind(80, write_others, lambda folder, name: OTHERS[name][2](next(folder.glob("file.*")))),
}


class Hangs(BaseException):
    """Raised after the time limit. ``except Exception`` does not catch it."""


def stop(*_: object) -> None:
    raise Hangs(f"more than {SECONDS} s")


def outcome(kind: Kind, folder: Path, seed: str | None) -> str | None:
    """Return None if an input is accepted, "refused" if it is refused correctly, otherwise the wrong behaviour."""
    folder.mkdir(parents=True)
    written = kind.write(folder, None if seed is None else random.Random(seed))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        kind.use(folder, written)
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
    before = signal.signal(signal.SIGALRM, stop)
    kind = KINDS[name]
    try:
        assert outcome(kind, tmp_path / "valid", None) is None
        seeds = [f"{name}{number}" for number in range(kind.inputs)]
        outcomes = {seed: outcome(kind, tmp_path / seed, seed) for seed in seeds}
    finally:
        signal.signal(signal.SIGALRM, before)
    wrong = {seed: text for seed, text in outcomes.items() if text not in (None, "refused")}
    assert not wrong, f"{len(wrong)} of {kind.inputs}: {dict(list(wrong.items())[:10])}"
    assert "refused" in outcomes.values()


def test_there_are_at_least_1000_inputs():
    assert sum(kind.inputs for kind in KINDS.values()) >= 1000
