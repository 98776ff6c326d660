"""Texts and tables of the results of a calibration or an evaluation, and the files that hold them."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from earlyexit_ssd.calibration.certificate import Certificate
from earlyexit_ssd.calibration.thresholds import FittedTemperature
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.evaluation.matches import PhotoRow
from earlyexit_ssd.evaluation.metrics import METRICS
from earlyexit_ssd.evaluation.results import Results, TableRow, Verdict, data_title, table_rows, timing_title
from earlyexit_ssd.evaluation.verdict import DETECTS_AP50
from earlyexit_ssd.files import write_image, write_json, write_text
from earlyexit_ssd.report.pictures import accuracy_against_cost, reliability_diagram


def figure(value: float | None, digits: int = 3) -> str:
    """Return the rounded value, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """Return a share in percent, or a dash for None."""
    return "-" if value is None else f"{100 * value:.1f} %"


def columns() -> dict[str, Callable[[TableRow], str]]:
    """Return heading -> function that formats a row's cell."""

    def cell(name: str, digits: int) -> Callable[[TableRow], str]:
        return lambda row: figure(row.number(name), digits)

    return {
        "exit": lambda row: row.name,
        "layer": lambda row: figure(row.layer, 0),
        **{heading: cell(*place) for metric in METRICS.values() for heading, place in metric.columns.items()},
        "confidence": lambda row: f"{row.confidence.mean:.2f} ± {row.confidence.std:.2f}" if row.confidence else "-",
        "MMAC": cell("mmacs", 0),
        "ms": lambda row: " ".join(filter(None, (figure(row.ms, 1), row.other_runtime))),
        "share": lambda row: share(row.share),
    }


def table_cells(results: Results, columns: Mapping[str, Callable[[TableRow], str]]) -> list[list[str]]:
    """Return the headings, then the cells of each of the `table_rows`."""
    return [list(columns), *([format_cell(row) for format_cell in columns.values()] for row in table_rows(results))]


def text_table(results: Results) -> str:
    """Return a table with aligned columns. Its rows are the exits, the routed detector, the detector without exits and
    the rivals. Undefined figures are "-"."""
    rows = table_cells(results, columns())
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown_table(results: Results) -> str:
    """Return the table of `text_table` in Markdown."""
    header, *rows = table_cells(results, columns())
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def text_report(results: Results) -> str:
    """Return a description of the evaluation, the table and the verdict, for the terminal and table.txt."""
    context = results.context
    by = "" if context.labelled else " by the full path; nobody labelled them"
    lines = [f"{data_title(results)}, {context.empty_images} of them without an object{by}"]
    if not context.labelled:
        lines.append("P to loc.err: agreement with what the full path finds; AP is not known")
    ms = f"ms of one image in {timing_title(results)}"
    if any(row.other_runtime for row in table_rows(results)):
        ms += "; ORT: in ONNX Runtime, not to be compared"
    lines += [f"P to loc.err at score {context.score:g} and IoU {context.iou:g}; {ms}", "", text_table(results), ""]
    return "\n".join(lines + (verdict_lines(results.verdict) if results.verdict else []))


def verdict_lines(verdict: Verdict) -> list[str]:
    """Return the verdict, the vetoes and the other findings, one a line."""
    vetoes = [f"  - veto: {finding.line}" for finding in verdict.findings if finding.veto]
    others = [f"  - {finding.line}" for finding in verdict.findings if not finding.veto]
    if verdict.ship:
        return [f"verdict: ship {'the exits' if verdict.what == 'routed' else verdict.what}", *others]
    besides = ["found besides:", *others] if others else []
    return ["verdict: do not ship the detector as it is", *vetoes, *besides]


def write_calibration(folder: Path, certificate: Certificate, temperatures: Sequence[FittedTemperature]) -> None:
    """Write certificate.json and calibration.txt, and reliability.png if there are exits with a branch."""
    write_text(folder / "calibration.txt", calibration_report(certificate, temperatures) + "\n")
    if temperatures:
        write_image(folder / "reliability.png", reliability_diagram(temperatures))
    certificate.save(folder / "certificate.json")


def calibration_report(certificate: Certificate, temperatures: Sequence[FittedTemperature]) -> str:
    """Return a line per exit, and the `guarantee_lines`."""
    measured, costs, router = certificate.measured, certificate.cost_model, certificate.router
    counts = {"copies": measured.equal_photos, "photos that look equal": measured.near_equal_photos}
    names = " and ".join(f"{count} {name}" for name, count in counts.items() if count)
    left_out = f" ({names} left out: each photo counts once)" if names else ""
    lines = [
        f"policy {router['policy']}, {measured.photos} calibration photos{left_out}",
        "",
        f"{'exit':8} {'threshold':>10} {'share':>8} {costs.unit:>9} {'temperature':>12} {'fitted':>7} {'ECE at 1':>9} "
        f"{'fitted':>7}",
    ]
    fits = {fitted.exit_name: fitted for fitted in temperatures}  # exits with a branch
    early = zip(measured.exit_share.items(), router["thresholds"], router["temperatures"], costs.exits, strict=False)
    for (name, leave), threshold, temperature, cost in early:
        text = "closed" if threshold >= CLOSED else f"{threshold:.4f}"
        line = f"{name:8} {text:>10} {100 * leave:6.1f} % {cost:9.1f}"
        if fitted := fits.get(name):
            line += f" {temperature:12.2f} {fitted.temperature:7.2f} {fitted.before.expected_error:9.3f}"
            line += f" {fitted.after.expected_error:7.3f}"
        lines.append(line)
    lines.append(f"{'full':8} {'':>10} {100 * measured.exit_share['full']:6.1f} % {costs.exits[-1]:9.1f}")
    return "\n".join([*lines, "", *guarantee_lines(certificate)])


def speedup_text(certificate: Certificate) -> str:
    """Return the mean cost compared with the detector without exits. Fewer MMACs need not be faster."""
    speedup, unit = certificate.measured.speedup, certificate.cost_model.unit
    if unit == "ms":
        return f"{speedup:.2f} times as fast as the detector without exits"
    return f"the detector without exits costs {speedup:.2f} times as many"


def guarantee_lines(certificate: Certificate) -> list[str]:
    """Return the figures on the calibration photos and the guarantee, one sentence a line."""
    measured, target, unit = certificate.measured, certificate.target, certificate.cost_model.unit
    reference = "what the full path says" if target.reference == "full" else "the labels"
    accuracy = "nobody labelled these photos, so AP is not known"
    if measured.labelled is not False:
        accuracy = f"AP50 {figure(measured.AP50)}, full path {figure(measured.AP50_full)}"
    lines = [f"{accuracy}; loss per photo {measured.loss:.4f} against {reference}"]
    if agreement := measured.agreement:
        line = f"agreement with the full path at score {target.score:g}: {agreement['kept']} of its"
        line += f" {agreement['objects']} objects kept, {agreement['added']} added"
        if agreement["same_photos"] is not None:
            line += f"; the same answer for {100 * agreement['same_photos']:.1f} % of the photos"
        lines.append(line)
    lines.append(f"mean cost {measured.cost:.1f} {unit}: {speedup_text(certificate)}")
    draws, draw = "the calibration photos", "photo"
    if target.block:
        draws, draw = f"the {measured.blocks} blocks of {target.block} calibration photos", f"block of {target.block}"
    if target.kind == "risk" and not certificate.closed:
        line = f"with probability {1 - target.delta:g} over the draw of {draws} the expected loss per {draw}"
        lines.append(f"{line} is at most {target.epsilon:g} (bound {measured.loss_bound:.4f}, {target.bound})")
    elif target.kind == "ap_drop":
        line = f"in {1 - target.delta:.0%} of bootstrap draws of {draws} at most {measured.AP50_lost_bound:.4f} AP50"
        lines.append(f"{line} is lost (target {target.value:g})")
        if measured.photos_needed is not None:
            lines.append(f"these are few for that: at least {measured.photos_needed} are needed")
    if certificate.closed:
        fix = "allow a larger loss, try another policy (ROUTING.POLICY), or train the exits longer"
        if measured.AP50_full is not None and measured.AP50_full < DETECTS_AP50:
            fix = "the full path does not detect, so train it first"
        elif target.kind == "risk" and measured.photos_needed is not None:
            shorter = ", from more photos or shorter blocks" if target.block else ""
            fix = f"at least {measured.photos_needed} {'blocks' if target.block else 'photos'} are needed{shorter}"
        lines.append(f"no exit opens, so nothing is lost and nothing gained: {fix}")
    return lines


def write_results(
    folder: Path, results: Results, pictures: Mapping[str, Image.Image], photos: Sequence[PhotoRow] = ()
) -> None:
    """Write metrics.json, table.txt, table.md, ap_against_cost.png, a PNG file for each of the ``pictures`` (name ->
    picture), and photos.csv if there are rows (see `earlyexit_ssd.evaluation.matches.photo_list`)."""
    write_json(folder / "metrics.json", results.to_json())
    write_text(folder / "table.txt", text_report(results) + "\n")
    write_text(folder / "table.md", markdown_table(results) + "\n")
    if photos:
        rows = io.StringIO()
        writer = csv.DictWriter(rows, list(photos[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(photos)  # None becomes an empty field
        write_text(folder / "photos.csv", rows.getvalue())
    for name, picture in {"ap_against_cost": accuracy_against_cost(results), **pictures}.items():
        write_image(folder / f"{name}.png", picture)
