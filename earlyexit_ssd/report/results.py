"""The folders of results: what a calibration wrote, and what an evaluation did."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from earlyexit_ssd.calibration.certificate import Certificate, Measured
from earlyexit_ssd.calibration.temperature import FittedTemperature, Reliability
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.evaluation.matches import PhotoRow
from earlyexit_ssd.evaluation.results import Results
from earlyexit_ssd.files import write_image, write_json, write_text
from earlyexit_ssd.report.charts import EXITS, PLAIN, ROUTED, accuracy_against_cost, draw_charts
from earlyexit_ssd.report.tables import figure, markdown_table, text_report


def write_calibration(folder: Path, certificate: Certificate, temperatures: Sequence[FittedTemperature]) -> None:
    """certificate.json, calibration.txt and, for exits with a branch, reliability.png, each complete or not at all."""
    write_text(folder / "calibration.txt", calibration_report(certificate, temperatures) + "\n")
    if temperatures:
        write_image(folder / "reliability.png", reliability_diagram(temperatures))
    certificate.save(folder / "certificate.json")


def calibration_report(certificate: Certificate, temperatures: Sequence[FittedTemperature]) -> str:
    """A line per exit, and what is promised."""
    measured, unit = certificate.measured, certificate.cost_model.unit
    lines = [f"policy {certificate.router['policy']}, {measured.photos} calibration photos{_left_out(measured)}", ""]
    lines.append(
        f"{'exit':8} {'threshold':>10} {'share':>8} {unit:>9} {'temperature':>12} {'fitted':>7} {'ECE at 1':>9} "
        f"{'fitted':>7}"
    )
    costs = certificate.cost_model.exits
    by_name = {fitted.exit_name: fitted for fitted in temperatures}
    router = certificate.router
    for (name, share), threshold, temperature, cost in zip(
        measured.exit_share.items(), router["thresholds"], router["temperatures"], costs, strict=False
    ):
        shown = "closed" if threshold >= CLOSED else f"{threshold:.4f}"
        line = f"{name:8} {shown:>10} {100 * share:6.1f} % {cost:9.1f}"
        if name in by_name:  # an exit with a branch
            fitted = by_name[name]
            line += f" {temperature:12.2f} {fitted.temperature:7.2f} {fitted.before.expected_error:9.3f}"
            line += f" {fitted.after.expected_error:7.3f}"
        lines.append(line)
    lines.append(f"{'full':8} {'':>10} {100 * measured.exit_share['full']:6.1f} % {costs[-1]:9.1f}")
    lines += ["", *_promise(certificate)]
    return "\n".join(lines)


def _left_out(measured: Measured) -> str:
    parts = {"copies": measured.equal_photos, "photos that look equal": measured.near_equal_photos}
    shown = " and ".join(f"{count} {what}" for what, count in parts.items() if count)
    return f" ({shown} left out: each photo counts once)" if shown else ""


def _agreement(certificate: Certificate) -> list[str]:
    """How far routing says what the full path says."""
    found = certificate.measured.agreement
    if not found:
        return []
    score = certificate.target.score
    same = (
        ""
        if found["same_photos"] is None
        else f"; the same answer for {100 * found['same_photos']:.1f} % of the photos"
    )
    return [
        f"agreement with the full path at score {score:g}: {found['kept']} of its {found['objects']} objects kept, "
        f"{found['added']} added{same}"
    ]


def _promise(certificate: Certificate) -> list[str]:
    measured, target, unit = certificate.measured, certificate.target, certificate.cost_model.unit
    against = "what the full path says" if target.reference == "full" else "the labels"
    accuracy = "nobody labelled these photos, so AP is not known"
    if measured.labelled is not False:
        accuracy = f"AP50 {figure(measured.AP50)}, full path {figure(measured.AP50_full)}"
    lines = [
        f"{accuracy}; loss per photo {measured.loss:.4f} against {against}",
        *_agreement(certificate),
        f"mean cost {measured.cost:.1f} {unit}, {measured.speedup:.2f} times as fast as the detector without exits",
    ]
    draws, drawn = "the calibration photos", "photo"
    if target.block:
        size = target.block
        draws, drawn = f"the {measured.blocks} blocks of {size} calibration photos", f"block of {size}"
    if target.kind == "risk":
        promise = (
            "every exit stays closed: nothing is lost, nothing gained"
            if certificate.closed
            else f"with probability {1 - target.delta:g} over the draw of {draws} the expected loss "
            f"per {drawn} is at most {target.epsilon:g} (bound {measured.loss_bound:.4f}, {target.bound})"
        )
        lines.append(promise)
    if target.kind == "ap_drop":
        lines.append(
            f"in {1 - target.delta:.0%} of bootstrap draws of {draws} at most "
            f"{measured.AP50_lost_bound:.4f} AP50 is lost (target {target.value:g})"
        )
        if measured.photos_needed is not None:
            lines.append(f"these are few for that: at least {measured.photos_needed} are needed, see docs/routing.md")
    return lines


def reliability_diagram(temperatures: Sequence[FittedTemperature]) -> Image.Image:
    """Per exit, how often the most probable class is right where it has this probability, before and after."""

    def draw(axes: np.ndarray) -> None:
        for column, fitted in enumerate(temperatures):
            one = axes[0, column]
            one.plot([0, 1], [0, 1], color=PLAIN, linestyle=":", linewidth=1)
            _draw_curve(one, fitted.before, PLAIN, "before")
            _draw_curve(one, fitted.after, ROUTED if fitted.temperature != 1 else EXITS, "after")
            one.set_title(f"{fitted.exit_name}, temperature {fitted.temperature:.2f}")
            one.set_xlabel("probability of the class")
            one.legend(frameon=False)
        axes[0, 0].set_ylabel("share that is right")

    return draw_charts(draw, 1, len(temperatures), (4.2 * len(temperatures), 4))


def _draw_curve(axes: Axes, reliability: Reliability, color: str, label: str) -> None:
    filled = [index for index, count in enumerate(reliability.count) if count]
    confidence = [reliability.confidence[index] for index in filled]
    accuracy = [reliability.accuracy[index] for index in filled]
    axes.plot(confidence, accuracy, color=color, marker="o", label=f"{label}, error {reliability.expected_error:.3f}")


# The folder of results: metrics.json, the table, the charts and the pictures.


def write_results(
    out_dir: str | os.PathLike[str],
    results: Results,
    pictures: Mapping[str, Image.Image] | None = None,
    photos: Sequence[PhotoRow] = (),
) -> list[Path]:
    """Write what an evaluation found; each file appears complete or not at all.

    Args:
        out_dir: made if missing; files of an earlier evaluation are replaced.
        results: of `earlyexit_ssd.evaluation.evaluate.evaluate_exits`.
        pictures: name of a file without suffix -> picture, written as PNG.
        photos: rows of photos.csv, `earlyexit_ssd.evaluation.matches.photo_list`; without one there is no file.

    Returns:
        the paths written: metrics.json, table.txt, table.md, photos.csv, ap_against_cost.png and the pictures.
    """
    folder = Path(out_dir)
    images = {"ap_against_cost": accuracy_against_cost(results), **(pictures or {})}
    write_json(folder / "metrics.json", results.to_json())
    write_text(folder / "table.txt", text_report(results) + "\n")
    write_text(folder / "table.md", markdown_table(results) + "\n")
    if photos:
        write_text(folder / "photos.csv", _csv(photos))
    for name, image in images.items():
        write_image(folder / f"{name}.png", image)
    texts = ("metrics.json", "table.txt", "table.md", *(["photos.csv"] if photos else []))
    return [folder / name for name in (*texts, *(f"{name}.png" for name in images))]


def _csv(rows: Sequence[PhotoRow]) -> str:
    """With a header; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
