"""Photos of the user through a detector with exits: what it finds, where it stops, how long it takes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from PIL import Image

from earlyexit_ssd.calibration import load_certificate
from earlyexit_ssd.data.folder import find_files
from earlyexit_ssd.data.images import PHOTO_SUFFIXES, as_tensor, read_image
from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.files import make_folder, sha256, write_image
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.pipeline.build import build_router, open_model
from earlyexit_ssd.report.pictures import Example, detection_grid

logger = logging.getLogger(__name__)

ONE_TILE, MANY_TILES = 640, 320
"""Width of a photo in the picture, pixels, alone and beside others."""


@dataclass(frozen=True)
class Answer:
    """What the model says about one photo.

    exit_index, exit_name: the exit taken; without a router the full path. confidence: of that exit, None without a
    router. ms: of the whole call. found: that exit's detections, the surest first: class, score, xyxy in pixels.
    picture: the photo with boxes, or what every exit sees, side by side.
    """

    exit_index: int
    exit_name: str
    confidence: float | None
    ms: float
    found: tuple[tuple[str, float, tuple[float, ...]], ...]
    picture: Image.Image


def demonstrate(
    photos: Sequence[str | os.PathLike[str]],
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    cfg: CfgNode | None = None,
    score: float = 0.5,
    all_exits: bool = False,
) -> Iterator[str | DataError]:
    """Look at each photo and write its picture into the folder ``out``.

    Args:
        photos: files, and folders of them; weights, cfg: see :func:`open_demo`; score, all_exits: see :func:`look`.

    Yields:
        what there is to say of a photo, a line for it and one for each detection, or why it could not be read.

    Raises:
        EarlyExitError: unusable weights or score, or a folder without photos.
    """
    if not 0 <= score <= 1:
        raise EarlyExitError(f"score {score}: expected a number in [0, 1]")
    paths = photo_paths(photos)
    make_folder(out)
    model = open_demo(weights, cfg)
    _note_calibration_photos(model, paths)
    with torch.no_grad():
        model([torch.zeros(3, 320, 320)])  # the first call is slower than the others
    for photo, picture in zip(paths, picture_paths(paths, out), strict=True):
        try:
            answer = look(model, photo, score, all_exits)
        except DataError as error:
            yield error
            continue
        write_image(picture, answer.picture)
        sure = "" if answer.confidence is None else f", confidence {answer.confidence:.2f}"
        lines = [f"{photo}: {answer.exit_name}{sure}, {answer.ms:.0f} ms, {len(answer.found)} found -> {picture}"]
        for name, value, box in answer.found:
            lines.append(f"  {name} {value:.2f} at {', '.join(f'{side:.0f}' for side in box)}")
        yield "\n".join(lines)


def _note_calibration_photos(model: EarlyExitSSDLite, photos: Sequence[Path]) -> None:
    """Say which photos calibrated the model's routing: what it does on them flatters."""
    certificate = getattr(model.router, "certificate", None)
    try:
        if certificate is not None:
            certificate.require_unseen((photo, sha256(photo)) for photo in photos if photo.is_file())
    except EarlyExitError as error:
        logger.warning("%s", error)


def open_demo(weights: str | os.PathLike[str], cfg: CfgNode | None = None) -> EarlyExitSSDLite:
    """Shipped weights or a file, with its own routing or with that of a configuration.

    Raises:
        EarlyExitError: unusable weights, or a certificate that is not theirs.
    """
    if cfg is None:
        return EarlyExitSSDLite.from_pretrained(weights)
    model, _, info = open_model(cfg, weights)
    if cfg.ROUTING.CERTIFICATE:
        model.router = load_certificate(cfg.ROUTING.CERTIFICATE).router_for(model)
    else:
        model.router = build_router(cfg, {"num_exits": model.num_early_exits, **(info.get("router") or {})})
    return model


def photo_paths(arguments: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Files as they are, and for a folder the photos in and below it; a warning counts what else is there.

    Raises:
        DataError: a folder without a picture.
    """
    paths: list[Path] = []
    for argument in map(Path, arguments):
        if not os.path.isdir(argument):
            paths.append(argument)
            continue
        inside, others = find_files(argument, PHOTO_SUFFIXES)
        if others:
            text = "%s: %d files left out, which are no photos; the first: %s"
            logger.warning(text, argument, len(others), others[0])
        if not inside:
            raise DataError(f"{argument}: no picture in this folder; name photos, or a folder that holds some")
        paths += inside
    return paths


def picture_paths(photos: Sequence[Path], folder: str | os.PathLike[str]) -> list[Path]:
    """A PNG in ``folder`` for each photo; equal names get numbers (dog.png, dog_2.png), and no photo is overwritten."""
    folder = Path(folder)
    taken = {photo.name.lower().removesuffix(".png") for photo in photos if photo.parent.resolve() == folder.resolve()}
    names = []
    for photo in photos:
        name, number = photo.stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{photo.stem}_{number}"
        taken.add(name.lower())
        names.append(folder / f"{name}.png")
    return names


@torch.no_grad()
def look(model: EarlyExitSSDLite, photo: str | os.PathLike[str], score: float, all_exits: bool = False) -> Answer:
    """Run one photo through the model, which is in eval mode on the CPU.

    Args:
        score: least score of a detection that is reported, in [0, 1].
        all_exits: draw what every exit sees; what is reported is the exit taken all the same.

    Raises:
        DataError: no such photo, or not a picture.
    """
    image = as_tensor(read_image(photo))
    start = time.perf_counter()
    (detection,) = model([image])
    ms = 1000 * (time.perf_counter() - start)
    last = model.num_early_exits
    index = int(detection.get("exit_index", last))
    confidence = float(detection["exit_confidence"]) if "exit_confidence" in detection else None
    name = model.exit_names[index]
    if all_exits:
        outputs = model.exit_outputs([image])
        seen = [model.detections(outputs, exit_index)[0] for exit_index in range(last + 1)]
        routed = None if model.router is None else index
        rows = [Example(image, None, seen, routed)]
        picture = detection_grid(rows, model.exit_names, model.classes, score, MANY_TILES)
    else:
        title = name if confidence is None else f"{name}, confidence {confidence:.2f}"
        picture = detection_grid([Example(image, None, [detection])], [title], model.classes, score, ONE_TILE)
    order = detection["scores"].argsort(descending=True)
    rows = zip(*(detection[key][order].tolist() for key in ("labels", "scores", "boxes")), strict=True)
    found = tuple((model.classes[label - 1], value, tuple(box)) for label, value, box in rows if value >= score)
    return Answer(index, name, confidence, ms, found, picture)
