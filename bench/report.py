"""What `make bench` writes: the table, notes and plots of docs/PERFORMANCE.md.

Everything shown comes from lines of docs/bench-results.jsonl: of each benchmark the newest one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from bench.harness import Curve, Figure, Json

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
HEAD = "| what | | against | | ratio | wanted | |\n|---|---|---|---|---|---|---|"
WIDTH, HEIGHT, MARGIN = 520, 320, 56
COLOURS = ("#1f5fa8", "#c2571a", "#2f7d4f", "#7a3fa0", "#8a7a18", "#555555")


def render(page: str, lines: Sequence[Json]) -> str:
    """The page with fresh results between its two marks."""
    head, _, rest = page.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise ValueError("docs/PERFORMANCE.md has lost the marks around its results")
    sections = "\n\n".join(section(line) for line in newest(lines))
    return f"{head}{BEGIN}\n\n{sections}\n\n{images(lines)}{END}{tail}"


def newest(lines: Iterable[Json]) -> list[Json]:
    """The last result of each benchmark, in the order of their names; full ones come first."""
    known = list(lines)
    found = {
        line["bench"]: line for form in ("quick", "full") for line in known if line["form"] == form
    }
    return [found[name] for name in sorted(found)]


def section(line: Json) -> str:
    """The results of one run of one benchmark as Markdown."""
    said = ("date", "commit", "processor", "cores", "load", "versions")
    where = ", ".join(f"{name} {line[name]}" for name in said if line.get(name))
    size = ", ".join(f"{name} {value}" for name, value in line.get("size", {}).items())
    parts = [f"### {line['bench']}", f"{where}; {size}; {line['seconds']:.0f} s"]
    if line.get("error"):
        parts.append(f"**failed**: {line['error']}")
    if line["figures"]:
        parts.append("\n".join([HEAD, *(_row(Figure(**each)) for each in line["figures"])]))
    return "\n\n".join([*parts, *line["notes"]])


def _row(f: Figure) -> str:
    sign = "≥" if f.at_least else "≤"
    wanted = "–" if f.wanted is None else f"{sign} {f.wanted:.3g}"
    verdict = "**missed**" if f.verdict == "missed" else f.verdict
    cells = (f.what, _amount(f.subject, f.unit), f.against, _amount(f.reference, f.unit))
    return f"| {' | '.join(cells)} | {f.ratio:.3g} | {wanted} | {verdict} |"


def _amount(value: float, unit: str) -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f} {unit}".strip()


# --- plots ---------------------------------------------------------------------------------------


def images(lines: Sequence[Json]) -> str:
    """The links to the plots, as Markdown."""
    names = plots(lines)
    return "".join(f"![{title}](plots/{slug(title)}.svg)\n\n" for title in names)


def plots(lines: Sequence[Json]) -> dict[str, list[Curve]]:
    """The curves of the newest results, by the title of their plot."""
    found: dict[str, list[Curve]] = {}
    for line in newest(lines):
        for each in line["curves"]:
            curve = Curve(**each | {"axes": tuple(each["axes"])})
            found.setdefault(curve.plot, []).append(curve)
    return found


def draw(lines: Sequence[Json], folder: Path) -> None:
    """Write every plot into the folder, and clear away those that nobody draws any more."""
    folder.mkdir(exist_ok=True)
    wanted = plots(lines)
    for old in folder.glob("*.svg"):
        if old.stem not in {slug(title) for title in wanted}:
            old.unlink()
    for title, curves in wanted.items():
        (folder / f"{slug(title)}.svg").write_text(svg(title, curves))


def slug(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def svg(title: str, curves: Sequence[Curve]) -> str:
    """A plot of straight line segments from the origin's corner; both axes begin at 0."""
    right = max(x for c in curves for x in c.x) or 1
    top = max(y for c in curves for y in c.y) or 1

    def at(x: float, y: float) -> tuple[float, float]:
        across = MARGIN + x / right * (WIDTH - 2 * MARGIN)
        return round(across, 1), round(HEIGHT - MARGIN - y / top * (HEIGHT - 2 * MARGIN), 1)

    across, up = curves[0].axes

    def ticks() -> Iterator[str]:
        for x in sorted({x for c in curves for x in c.x}):
            yield _text(at(x, 0)[0], HEIGHT - MARGIN + 16, f"{x:g}", "middle")
        for y in (top * part / 4 for part in range(5)):
            yield _text(MARGIN - 6, at(0, y)[1] + 4, f"{y:,.3g}", "end")

    across, up = curves[0].axes
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 18, title, "middle"),
        _text(WIDTH / 2, HEIGHT - 12, across, "middle"),
        _text(8, 34, up, "start"),
        _line([at(0, top), at(0, 0), at(right, 0)], "#888"),
        *ticks(),
    ]
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        points = [at(x, y) for x, y in zip(curve.x, curve.y, strict=True)]
        parts.append(_line(points, colour))
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(_text(MARGIN + 12, 42 + 15 * number, curve.name, "start", colour))
    return "\n".join([*parts, "</svg>\n"])


def _line(points: Sequence[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#222") -> str:
    place = f'x="{round(x, 1)}" y="{round(y, 1)}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}">{escape(text)}</text>'
