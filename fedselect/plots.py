"""Plots as SVG text, drawn with attributes alone: no script, no style, nothing fetched.

Owns lines, axes and colours. Whatever text comes in is escaped. Must not know what a report is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH = 760  # px of every plot
LEFT, RIGHT, ROW = 170, 30, 18
GREY, GRID, INK = "#767676", "#dddddd", "#222222"
SIGNS = {"gain": "#1a7f4b", "loss": "#b3261e", "undecided": GREY}
# Okabe and Ito: told apart with any colour vision.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")
LABELLED = 12  # lines that are named at their end
Range = tuple[float, float]


@dataclass
class Canvas:
    """The elements of one plot, in pixels from the top left."""

    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def add(self, tag: str, text: str | None = None, /, **attributes: object) -> None:
        """One element; numbers are rounded to a tenth of a pixel."""
        pairs = "".join(f' {_name(k)}="{_value(v)}"' for k, v in attributes.items())
        inner = "/>" if text is None else f">{escape(text)}</{tag}>"
        self.parts.append(f"<{tag}{pairs}{inner}")

    def line(self, a: tuple[float, float], b: tuple[float, float], **attributes: object) -> None:
        """A straight line."""
        style: dict[str, object] = {"stroke": GRID, **attributes}
        self.add("line", x1=a[0], y1=a[1], x2=b[0], y2=b[1], **style)

    def text(self, x: float, y: float, words: str, /, **attributes: object) -> None:
        """Words at a place; ``text_anchor`` says which end of them."""
        style: dict[str, object] = {"font_size": 12, "fill": INK, **attributes}
        self.add("text", words, x=x, y=y, **style)

    def svg(self) -> str:
        """The whole plot."""
        box = f'viewBox="0 0 {WIDTH} {_value(self.height)}" width="{WIDTH}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {box} font-family="sans-serif">'
        return f"{head}<title>{escape(self.title)}</title>{''.join(self.parts)}</svg>"


def _name(keyword: str) -> str:
    return keyword.replace("_", "-")


def _value(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else escape(str(value))


def ticks(low: float, high: float, most: int = 7, *, least: float = 0.0) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most ``most`` and one, ``least`` apart or more."""
    span = high - low or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= most)
    step = max(step, least)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]


@dataclass(frozen=True)
class Scale:
    """Values on a line of pixels."""

    values: Range
    pixels: Range

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        (low, high), (start, stop) = self.values, self.pixels
        return start + (value - low) / ((high - low) or 1.0) * (stop - start)


def padded(values: Iterable[float], *, include: Iterable[float] = ()) -> Range:
    """A range with room at both ends around all values."""
    every = [*values, *include] or [0.0, 1.0]
    room = 0.05 * (max(every) - min(every)) or 1.0
    return min(every) - room, max(every) + room


def _across(canvas: Canvas, values: Range, unit: str, *, least: float = 0.0) -> Scale:
    """A horizontal axis with its grid, at the foot of the canvas."""
    scale, foot = Scale(values, (LEFT, WIDTH - RIGHT)), canvas.height - 34
    for tick in ticks(*values, least=least):
        canvas.line((scale(tick), 6), (scale(tick), foot), stroke=GRID)
        canvas.text(scale(tick), foot + 14, f"{tick:g}", text_anchor="middle", font_size=11)
    canvas.text((LEFT + WIDTH - RIGHT) / 2, foot + 29, unit, text_anchor="middle", font_size=11)
    return scale


def _label(canvas: Canvas, y: float, words: str) -> None:
    short = words if len(words) <= 26 else f"{words[:12]}…{words[-12:]}"
    canvas.text(LEFT - 8, y + 4, short, text_anchor="end")


# --- the plots ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A value with its interval; ``sign`` is a key of ``SIGNS``."""

    label: str
    value: float
    interval: Range
    sign: str = "undecided"


def intervals(title: str, bars: Sequence[Bar], *, unit: str, mark: float = 0.0) -> str:
    """One row per bar: a dot and its interval; a line at 0 and a dashed one at ``mark``."""
    canvas = Canvas(ROW * len(bars) + 46, title)
    ends = [end for bar in bars for end in bar.interval]
    scale = _across(canvas, padded(ends, include=(0.0, mark)), unit)
    foot = canvas.height - 34
    canvas.line((scale(0), 4), (scale(0), foot), stroke=INK)
    if mark:
        style = {"stroke": SIGNS["loss"], "stroke_dasharray": "4 4"}
        canvas.line((scale(mark), 4), (scale(mark), foot), **style)
    for number, bar in enumerate(bars):
        y, colour = ROW * (number + 0.7), SIGNS[bar.sign]
        _label(canvas, y, bar.label)
        low, high = map(scale, bar.interval)
        canvas.line((low, y), (high, y), stroke=colour, stroke_width=2)
        canvas.add("circle", cx=scale(bar.value), cy=y, r=4.0, fill=colour)
    return canvas.svg()


def strips(title: str, rows: Mapping[str, Sequence[float]], *, unit: str) -> str:
    """One row per name: a dot for each value and a bar at their median."""
    canvas = Canvas(34 * len(rows) + 46, title)
    every = [value for values in rows.values() for value in values]
    scale = _across(canvas, padded(every, include=(0.0,)), unit)
    canvas.line((scale(0), 4), (scale(0), canvas.height - 34), stroke=INK)
    for number, (name, values) in enumerate(rows.items()):
        y = 34 * (number + 0.55)
        _label(canvas, y, name)
        for value in values:
            dot = {"fill": PALETTE[0], "fill_opacity": 0.5}
            canvas.add("circle", cx=scale(value), cy=y, r=5.0, **dot)
        middle = scale(sorted(values)[len(values) // 2]) if values else None
        if middle is not None:
            canvas.line((middle, y - 11), (middle, y + 11), stroke=INK, stroke_width=3)
    return canvas.svg()


def amounts(title: str, rows: Mapping[str, float], *, unit: str) -> str:
    """One bar from 0 per name, with its amount written at the end."""
    canvas = Canvas(26 * len(rows) + 46, title)
    scale = _across(canvas, (0.0, 1.15 * max([*rows.values(), 1e-9])), unit)
    for number, (name, value) in enumerate(rows.items()):
        y, colour = 26 * number + 5, PALETTE[number % 2]
        _label(canvas, y + 9, name)
        width = scale(value) - LEFT
        canvas.add("rect", x=LEFT, y=y, width=width, height=18, fill=colour)
        canvas.text(scale(value) + 6, y + 13, f"{value:.3g}", font_size=11)
    return canvas.svg()


def spans(title: str, rows: Mapping[str, Sequence[float]], *, unit: str) -> str:
    """One bar per name up to the mean of its values, with a line from the least to the largest."""
    canvas = Canvas(ROW * len(rows) + 46, title)
    scale = _across(canvas, (0.0, 100.0), unit)
    for number, (name, values) in enumerate(rows.items()):
        y = ROW * (number + 0.7)
        _label(canvas, y, name)
        mean = sum(values) / len(values)
        width = scale(mean) - LEFT
        canvas.add("rect", x=LEFT, y=y - 6, width=width, height=12, fill=PALETTE[4])
        low, high = scale(min(values)), scale(max(values))
        canvas.line((low, y), (high, y), stroke=INK, stroke_width=2)
    return canvas.svg()


Line = Sequence[tuple[float, float | None]]


def lines(title: str, rows: Mapping[str, Line], *, x: str, y: str, top: float) -> str:
    """One line per name over whole numbers, from 0 to ``top``; a gap where a value is None."""
    canvas = Canvas(300, title)
    every = [place for line in rows.values() for place, _ in line]
    across = _across(canvas, padded(every), x, least=1.0)
    up = Scale((0.0, top), (canvas.height - 34, 10))
    for tick in ticks(0.0, top):
        canvas.line((LEFT, up(tick)), (WIDTH - RIGHT, up(tick)))
        canvas.text(LEFT - 6, up(tick) + 4, f"{tick:g}", text_anchor="end", font_size=11)
    canvas.text(8, 20, y, font_size=11)
    for number, (name, line) in enumerate(rows.items()):
        colour = PALETTE[number % len(PALETTE)]
        known = [(across(a), up(b)) for a, b in line if b is not None]
        places = " ".join(f"{a:.1f},{b:.1f}" for a, b in known)
        style = {"fill": "none", "stroke": colour, "stroke_width": 2}
        canvas.add("polyline", points=places, **style)
        for a, b in known if len(known) < 40 else known[-1:]:
            canvas.add("circle", cx=a, cy=b, r=2.5, fill=colour)
        if len(rows) <= LABELLED:
            canvas.text(8, 44 + 16 * number, name[:22], fill=colour, font_size=11)
    return canvas.svg()


def scatter(title: str, points: Sequence[tuple[float, float, str]], *, x: str, y: str) -> str:
    """A dot for each (x, y, sign), a key of ``SIGNS``; a line where y is 0."""
    canvas = Canvas(300, title)
    across = _across(canvas, padded([a for a, _, _ in points]), x)
    range_y = padded([b for _, b, _ in points], include=(0.0,))
    up = Scale(range_y, (canvas.height - 34, 10))
    for tick in ticks(*range_y):
        canvas.line((LEFT, up(tick)), (WIDTH - RIGHT, up(tick)))
        canvas.text(LEFT - 6, up(tick) + 4, f"{tick:g}", text_anchor="end", font_size=11)
    canvas.line((LEFT, up(0)), (WIDTH - RIGHT, up(0)), stroke=INK)
    canvas.text(8, 20, y, font_size=11)
    for a, b, sign in points:
        canvas.add("circle", cx=across(a), cy=up(b), r=5.0, fill=SIGNS[sign], fill_opacity=0.7)
    return canvas.svg()


Join = tuple[int, int, float]  # two clusters (leaves first, then earlier joins) and their distance


def dendrogram(title: str, names: Sequence[str], joins: Sequence[Join], *, unit: str) -> str:
    """A tree of n leaves and n − 1 ``joins``, leaves in its own order, distances to the right."""
    canvas = Canvas(ROW * len(names) + 46, title)
    top = max([distance for *_, distance in joins], default=0.0) or 1.0
    scale = _across(canvas, (0.0, 1.05 * top), unit)
    places: dict[int, tuple[float, float]] = {}
    for row, leaf in enumerate(_leaves(len(names), joins)):
        places[leaf] = (scale(0), ROW * (row + 0.7))
        _label(canvas, places[leaf][1], names[leaf])
    for number, (one, other, distance) in enumerate(joins, start=len(names)):
        x, ends = scale(distance), (places[one], places[other])
        for end in ends:
            canvas.line(end, (x, end[1]), stroke=PALETTE[0], stroke_width=2)
        canvas.line((x, ends[0][1]), (x, ends[1][1]), stroke=PALETTE[0], stroke_width=2)
        places[number] = (x, (ends[0][1] + ends[1][1]) / 2)
    return canvas.svg()


def _leaves(count: int, joins: Sequence[Join]) -> list[int]:
    """The leaves in an order in which no two branches cross."""
    below = {leaf: [leaf] for leaf in range(count)}
    for number, (one, other, _) in enumerate(joins, start=count):
        below[number] = below.pop(one) + below.pop(other)
    return [leaf for leaves in below.values() for leaf in leaves]


def matrix(title: str, names: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    """A square of cells, the darker the closer to 1; grey where there is no value."""
    cell = min(30, (WIDTH - LEFT - RIGHT) / max(1, len(names)))
    canvas = Canvas(cell * len(names) + 16, title)
    for i, name in enumerate(names):
        _label(canvas, cell * (i + 0.5), name)
        for j, value in enumerate(values[i]):
            x, y = LEFT + cell * j, cell * i
            shade = "#eeeeee" if value is None else _shade(value)
            side = {"width": cell - 1, "height": cell - 1}
            canvas.add("rect", x=x, y=y, fill=shade, **side)
            if value is not None and cell >= 24:
                ink = "#ffffff" if value > 0.6 else INK
                place = {"text_anchor": "middle", "font_size": 10, "fill": ink}
                canvas.text(x + cell / 2, y + cell / 2 + 4, f"{100 * value:.0f}", **place)
    return canvas.svg()


def _shade(value: float) -> str:
    """White at 0, blue at 1."""
    share = min(1.0, max(0.0, value))
    return "#" + "".join(f"{round(255 + share * (end - 255)):02x}" for end in (0, 68, 136))
