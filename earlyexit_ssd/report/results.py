"""The folder of results: metrics.json, the table, the charts and the pictures."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from earlyexit_ssd.files import write_image, write_json, write_text
from earlyexit_ssd.report.plot import accuracy_against_time
from earlyexit_ssd.report.rivals import accuracy_against_cost
from earlyexit_ssd.report.table import markdown_table, text_report


def write_results(
    out_dir: str | os.PathLike[str],
    metrics: Mapping[str, Any],
    pictures: Mapping[str, Image.Image] | None = None,
    photos: Sequence[Mapping[str, Any]] = (),
) -> list[Path]:
    """Write what an evaluation found; each file appears complete or not at all.

    Args:
        out_dir: made if missing; files of an earlier evaluation are replaced.
        metrics: of `earlyexit_ssd.evaluation.metrics.evaluate_exits`.
        pictures: name of a file without suffix -> picture, written as PNG.
        photos: rows of photos.csv, `earlyexit_ssd.evaluation.photo_losses.photo_list`; without one there is no file.

    Returns:
        the paths written: metrics.json, table.txt, table.md, photos.csv, ap50_against_ms.png, ap_against_cost.png and
        the pictures.
    """
    folder = Path(out_dir)
    charts = {"ap50_against_ms": accuracy_against_time(metrics), "ap_against_cost": accuracy_against_cost(metrics)}
    images = {**charts, **(pictures or {})}
    write_json(folder / "metrics.json", metrics)
    write_text(folder / "table.txt", text_report(metrics) + "\n")
    write_text(folder / "table.md", markdown_table(metrics) + "\n")
    if photos:
        write_text(folder / "photos.csv", _csv(photos))
    for name, image in images.items():
        write_image(folder / f"{name}.png", image)
    texts = ("metrics.json", "table.txt", "table.md", *(["photos.csv"] if photos else []))
    return [folder / name for name in (*texts, *(f"{name}.png" for name in images))]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """With a header; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
