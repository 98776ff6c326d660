"""The picture of the README: ``python docs/draw_network.py`` writes docs/network.svg."""

from pathlib import Path

TRUNK, BRANCH, ROUTER, ANSWER = "#dbeafe", "#fef3c7", "#ede9fe", "#dcfce7"
TOP, MIDDLE, LOW, BOTTOM = 74, 166, 246, 326  # centres of the four rows, pixels


def box(x: float, y: float, width: float, lines: str, fill: str, height: float = 50) -> str:
    """A box around (x, y) with one or more lines of text."""
    shape = (
        f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="8" '
        f'fill="{fill}" stroke="#475569"/>'
    )
    return shape + text(x, y, lines)


def text(x: float, y: float, lines: str, anchor: str = "middle") -> str:
    """Lines of text, centred vertically on y."""
    parts = lines.split("\n")
    first = y + 5 - 9 * (len(parts) - 1)
    return "".join(
        f'<text x="{x:g}" y="{first + 18 * index:g}" text-anchor="{anchor}">{part}</text>'
        for index, part in enumerate(parts)
    )


def arrow(*points: tuple[float, float]) -> str:
    """A line through the points with a head at its end."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="#475569" stroke-width="1.8" marker-end="url(#head)"/>'


def exit_column(x: float, name: str) -> list[str]:
    """An exit: its branch, the router's question and the answer of photos that leave."""
    return [
        arrow((x, TOP), (x, MIDDLE - 26)),
        text(x + 8, TOP + 38, "tap", "start"),
        box(x, MIDDLE, 132, f"branch of\n{name}", BRANCH),
        arrow((x, MIDDLE + 25), (x, LOW - 26)),
        box(x, LOW, 132, "router:\nis it sure?", ROUTER),
        arrow((x, LOW + 25), (x, BOTTOM - 21)),
        text(x + 8, LOW + 40, "yes: stop", "start"),
        box(x, BOTTOM, 132, "detections", ANSWER, 40),
        arrow((x + 66, LOW), (x + 88, LOW), (x + 88, TOP + 27)),
        text(x + 94, (TOP + LOW) / 2 + 6, "no:\ngo on", "start"),
    ]


def network() -> str:
    """The default detector, exits behind trunk layers 8 and 12, as SVG on a light panel (for dark pages too)."""
    parts = [
        box(56, TOP, 72, "photo", "#f1f5f9"),
        arrow((92, TOP), (112, TOP)),
        box(174, TOP, 122, "trunk layers\n0 to 8", TRUNK),
        arrow((235, TOP), (331, TOP)),
        box(394, TOP, 122, "trunk layers\n9 to 12", TRUNK),
        arrow((455, TOP), (551, TOP)),
        box(626, TOP, 146, "layers 13 to 16,\nextra layers", TRUNK),
        arrow((699, TOP), (721, TOP)),
        box(786, TOP, 128, "SSDLite head", TRUNK),
        arrow((786, TOP + 25), (786, BOTTOM - 21)),
        box(786, BOTTOM, 132, "detections", ANSWER, 40),
        text(455, 26, "the full path: torchvision's SSDLite320 MobileNetV3-Large, unchanged"),
        *exit_column(266, "exit 8"),
        *exit_column(486, "exit 12"),
    ]
    head = (
        '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 10 5 0 10z" fill="#475569"/></marker>'
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 362" font-family="Helvetica, Arial, sans-serif" '
        'font-size="15" fill="#0f172a" role="img" aria-label="A detector with two early exits">\n'
        f"<defs>{head}</defs>\n"
        '<rect x="1" y="1" width="878" height="360" rx="12" fill="#ffffff" stroke="#cbd5e1"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("network.svg").write_text(network(), encoding="utf-8")
