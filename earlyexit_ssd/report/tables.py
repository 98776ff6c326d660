"""What a calibration and an evaluation found, as text and tables, and the files that they write."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from earlyexit_ssd.calibration.certificate import Certificate
from earlyexit_ssd.calibration.thresholds import FittedTemperature
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.evaluation.matches import PhotoRow
from earlyexit_ssd.evaluation.metrics import METRICS
from earlyexit_ssd.evaluation.results import Results, Row, Verdict, data_title, exit_rows, static_rows, timing_title
from earlyexit_ssd.files import write_image, write_json, write_text
from earlyexit_ssd.report.pictures import accuracy_against_cost, reliability_diagram


def figure(value: float | None, digits: int = 3) -> str:
    """Rounded; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def columns() -> dict[str, Callable[[Row], str]]:
    """Heading -> text of a cell; the first column is aligned left, the others right."""

    def cell(name: str, digits: int) -> Callable[[Row], str]:
        return lambda row: figure(row.number(name), digits)

    return {
        "exit": lambda row: row.name,
        "layer": lambda row: figure(row.layer, 0),
        **{heading: cell(*place) for metric in METRICS for heading, place in metric.columns.items()},
        "confidence": lambda row: f"{row.confidence.mean:.2f} ± {row.confidence.std:.2f}" if row.confidence else "-",
        "MMAC": cell("mmacs", 0),
        "ms": lambda row: " ".join(filter(None, (figure(row.ms, 1), row.other_runtime))),
        "share": lambda row: share(row.share),
    }


def _cells(results: Results) -> list[list[str]]:
    rows, cells = [*exit_rows(results), *static_rows(results)], columns()
    return [list(cells), *[[cell(row) for cell in cells.values()] for row in rows]]


def text_table(results: Results) -> str:
    """Exits, routed, without exits and rivals, one row each, columns aligned; undefined figures are "-"."""
    rows = _cells(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown_table(results: Results) -> str:
    """The same table in Markdown."""
    header, *rows = _cells(results)
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def text_report(results: Results) -> str:
    """What was evaluated, the table and the verdict, for the terminal and table.txt."""
    context = results.context
    by = "" if context.labelled else " by the full path; nobody labelled them"
    other = any(row.other_runtime for row in static_rows(results))
    ms = f"ms of one image in {timing_title(results)}" + ("; ORT: in ONNX Runtime, not to be compared" if other else "")
    lines = [f"{data_title(results)}, {context.empty_images} of them without an object{by}"]
    if not context.labelled:
        lines.append("P to loc.err: agreement with what the full path finds; AP is not known")
    lines += [f"P to loc.err at score {context.score:g} and IoU {context.iou:g}; {ms}", "", text_table(results), ""]
    return "\n".join(lines + (verdict_lines(results.verdict) if results.verdict else []))


def verdict_lines(verdict: Verdict) -> list[str]:
    """The verdict, its reasons, and apart from them what was found besides."""
    vetoes = [f"  - veto: {one.line}" for one in verdict.findings if one.veto]
    others = [f"  - {one.line}" for one in verdict.findings if not one.veto]
    if verdict.ship:
        return [f"verdict: ship {'the exits' if verdict.what == 'routed' else verdict.what}", *others]
    besides = ["found besides:", *others] if others else []
    return ["verdict: do not ship the routed detector as it is", *vetoes, *besides]


def write_calibration(folder: Path, certificate: Certificate, temperatures: Sequence[FittedTemperature]) -> None:
    """certificate.json, calibration.txt and, for exits with a branch, reliability.png, each complete or not at all."""
    write_text(folder / "calibration.txt", calibration_report(certificate, temperatures) + "\n")
    if temperatures:
        write_image(folder / "reliability.png", reliability_diagram(temperatures))
    certificate.save(folder / "certificate.json")


def calibration_report(certificate: Certificate, temperatures: Sequence[FittedTemperature]) -> str:
    """A line per exit, and what is promised."""
    measured, costs, router = certificate.measured, certificate.cost_model, certificate.router
    left_out = {"copies": measured.equal_photos, "photos that look equal": measured.near_equal_photos}
    left_out = " and ".join(f"{count} {what}" for what, count in left_out.items() if count)
    left_out = f" ({left_out} left out: each photo counts once)" if left_out else ""
    lines = [
        f"policy {router['policy']}, {measured.photos} calibration photos{left_out}",
        "",
        f"{'exit':8} {'threshold':>10} {'share':>8} {costs.unit:>9} {'temperature':>12} {'fitted':>7} {'ECE at 1':>9} "
        f"{'fitted':>7}",
    ]
    by_name = {fitted.exit_name: fitted for fitted in temperatures}
    early = zip(measured.exit_share.items(), router["thresholds"], router["temperatures"], costs.exits, strict=False)
    for (name, left), threshold, temperature, cost in early:
        shown = "closed" if threshold >= CLOSED else f"{threshold:.4f}"
        line = f"{name:8} {shown:>10} {100 * left:6.1f} % {cost:9.1f}"
        if fitted := by_name.get(name):  # an exit with a branch
            line += f" {temperature:12.2f} {fitted.temperature:7.2f} {fitted.before.expected_error:9.3f}"
            line += f" {fitted.after.expected_error:7.3f}"
        lines.append(line)
    lines.append(f"{'full':8} {'':>10} {100 * measured.exit_share['full']:6.1f} % {costs.exits[-1]:9.1f}")
    return "\n".join([*lines, "", *promise(certificate)])


def promise(certificate: Certificate) -> list[str]:
    """What is measured on the calibration photos, and what is promised, a sentence a line."""
    measured, target, unit = certificate.measured, certificate.target, certificate.cost_model.unit
    against = "what the full path says" if target.reference == "full" else "the labels"
    accuracy = "nobody labelled these photos, so AP is not known"
    if measured.labelled is not False:
        accuracy = f"AP50 {figure(measured.AP50)}, full path {figure(measured.AP50_full)}"
    lines = [f"{accuracy}; loss per photo {measured.loss:.4f} against {against}"]
    if found := measured.agreement:
        line = f"agreement with the full path at score {target.score:g}: {found['kept']} of its {found['objects']}"
        line += f" objects kept, {found['added']} added"
        if found["same_photos"] is not None:
            line += f"; the same answer for {100 * found['same_photos']:.1f} % of the photos"
        lines.append(line)
    times = f"{measured.speedup:.2f} times as fast as the detector without exits"
    lines.append(f"mean cost {measured.cost:.1f} {unit}, {times}")
    draws, drawn = "the calibration photos", "photo"
    if target.block:
        drawn = f"block of {target.block}"
        draws = f"the {measured.blocks} blocks of {target.block} calibration photos"
    if target.kind == "risk" and certificate.closed:
        lines.append("every exit stays closed: nothing is lost, nothing gained")
    elif target.kind == "risk":
        line = f"with probability {1 - target.delta:g} over the draw of {draws} the expected loss per {drawn}"
        lines.append(f"{line} is at most {target.epsilon:g} (bound {measured.loss_bound:.4f}, {target.bound})")
    elif target.kind == "ap_drop":
        line = f"in {1 - target.delta:.0%} of bootstrap draws of {draws} at most {measured.AP50_lost_bound:.4f} AP50"
        lines.append(f"{line} is lost (target {target.value:g})")
        if measured.photos_needed is not None:
            lines.append(f"these are few for that: at least {measured.photos_needed} are needed, see docs/routing.md")
    return lines


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
    write_json(folder / "metrics.json", results.to_json())
    texts = {"table.txt": text_report(results) + "\n", "table.md": markdown_table(results) + "\n"}
    if photos:
        rows = io.StringIO()
        writer = csv.DictWriter(rows, list(photos[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(photos)  # None is an empty field
        texts["photos.csv"] = rows.getvalue()
    for name, text in texts.items():
        write_text(folder / name, text)
    images = {"ap_against_cost": accuracy_against_cost(results), **(pictures or {})}
    for name, image in images.items():
        write_image(folder / f"{name}.png", image)
    return [folder / name for name in ("metrics.json", *texts, *(f"{name}.png" for name in images))]
