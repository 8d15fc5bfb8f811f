"""Charts as SVG elements. Their colours are classes of style.css, so they fit light and dark pages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40
SMALL = (360, 220)  # for many charts beside each other: text keeps its size
SKEWED = 12
COLORS = 10  # series classes s0..s9
MOST_POINTS = 400  # of a line


@dataclass
class Series:
    """A line: x and y of equal length. spread: half the length of an error bar at each point; 0 draws none."""

    name: str
    x: list[float]
    y: list[float]
    spread: list[float] = field(default_factory=list)
    dashed: bool = False


@dataclass
class Axis:
    """Maps values to pixels. pixels: where low and high are."""

    low: float
    high: float
    pixels: tuple[float, float]
    log: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (
            self.low, self.high, value)  # fmt: skip
        start, end = self.pixels
        return start + (value - low) / ((high - low) or 1) * (end - start)

    def ticks(self) -> list[float]:
        if self.log:
            return _log_ticks(self.low, self.high)
        step = _nice_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_chart(
    series: Sequence[Series],
    x_label: str = "",
    y_label: str = "",
    *,
    log_x: bool = False,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Markup:
    """Lines with error bars, and a legend if there are several. A single point in all has no chart: show its number."""
    width, height = size
    series = [thinned(one) for one in series if one.x]
    xs = [x for one in series for x in one.x]
    lows = [y - s for one in series for y, s in zip(one.y, one.spread or [0] * len(one.y), strict=True)]
    highs = [y + s for one in series for y, s in zip(one.y, one.spread or [0] * len(one.y), strict=True)]
    x_axis = Axis(*_range(xs, 0.04 if log_x else 0.0, log_x), (LEFT, width - RIGHT), log_x)
    y_axis = Axis(*_range([*lows, *highs], 0.06), (height - BOTTOM, TOP))
    lines = [_line(one, i, x_axis, y_axis) for i, one in enumerate(series)]
    return _figure([_grid(x_axis, y_axis, x_label, y_label), *lines], y_label or x_label, legend(series), width, height)


def histogram(values: Sequence[float], x_label: str, bins: int = 24) -> Markup:
    """How many values are in each interval."""
    finite = np.asarray([value for value in values if math.isfinite(value)])
    counts, edges = np.histogram(finite, bins=min(bins, max(1, len(set(finite.tolist())))))
    x_axis = Axis(float(edges[0]), float(edges[-1]), (LEFT, WIDTH - RIGHT))
    y_axis = Axis(0, float(counts.max()) * 1.06, (HEIGHT - BOTTOM, TOP))
    bars = []
    for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        left, right, top = x_axis.place(low), x_axis.place(high), y_axis.place(count)
        title = f"{low:.4g} to {high:.4g}: {count}"
        bars.append(
            f'<rect class="bar" x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(0.5, right - left - 1):.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{title}</title></rect>'
        )
    mean = x_axis.place(float(finite.mean()))
    bars.append(f'<path class="reference" d="M{mean:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    bars.append(f'<text class="note" x="{mean + 4:.1f}" y="{TOP + 10}">mean {finite.mean():.4g}</text>')
    return _figure([_grid(x_axis, y_axis, x_label, "samples"), *bars], f"histogram of {x_label}")


def usage_chart(counts: np.ndarray) -> Markup:
    """The share of tokens of each code, from the most to the least frequent, against an even use. counts [K].

    The shares have a logarithmic axis if the most frequent code has more than SKEWED times that of an even use.
    """
    shares = 100 * np.sort(counts)[::-1] / max(1, counts.sum())
    even = 100 / len(shares)
    log = bool(shares[0] > SKEWED * even)
    x_axis = Axis(1, max(2, len(shares)), (LEFT, WIDTH - RIGHT))
    low, high = (even / 100, float(shares[0]) * 1.3) if log else (0.0, max(float(shares[0]), even) * 1.06)
    y_axis, floor = Axis(low, high, (HEIGHT - BOTTOM, TOP), log), HEIGHT - BOTTOM
    ranks = _ranks(len(shares))
    points = [(x_axis.place(rank + 1), y_axis.place(max(low, float(shares[rank])))) for rank in ranks]
    area = f"M{LEFT} {floor}L" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + f"L{points[-1][0]:.1f} {floor}Z"
    at = y_axis.place(even)
    marks = [
        f'<path class="area" d="{area}"/>',
        f'<path class="reference" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>',
        f'<text class="note" x="{WIDTH - RIGHT}" y="{at - 5:.1f}" text-anchor="end">even use</text>',
    ]
    return _figure([_grid(x_axis, y_axis, "code, by rank", "% of tokens"), *marks], "usage of codes")


def _ranks(count: int) -> list[int]:
    """Ranks to draw of this many codes: evenly chosen, and more of the first ones."""
    even = np.linspace(0, count - 1, min(MOST_POINTS, count))
    first = np.geomspace(1, count, min(MOST_POINTS, count)) - 1
    return [int(rank) for rank in np.unique(np.concatenate([even, first]).round().astype(int))]


def dots(rows: Sequence[tuple[str, float, float]], x_label: str) -> Markup:
    """A value with an error bar for each name, below each other. rows: name, value, half the length of the bar."""
    finite = [row for row in rows if math.isfinite(row[1])]
    longest = max((len(name) for name, _, _ in finite), default=0)
    left, height = min(230, 20 + 7 * longest), TOP + 24 * len(finite) + BOTTOM
    low, high = _range([edge for _, value, half in finite for edge in (value - half, value + half)], 0.05)
    x_axis, bottom = Axis(low, high, (left, WIDTH - RIGHT)), height - BOTTOM
    parts = [_x_axis(x_axis, bottom, x_label, grid_top=TOP)]
    for place, (name, value, half) in enumerate(finite):
        y, x = TOP + 24 * place + 12, x_axis.place(value)
        parts.append(
            f'<text class="name label" x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(_cut(name, 31))}</text>'
        )
        if half > 0:
            start, end = x_axis.place(value - half), x_axis.place(value + half)
            parts.append(f'<path class="whisker s0" d="M{start:.1f} {y - 4}v8m0 -4H{end:.1f}m0 -4v8"/>')
        title = f"{name}: {value:.4g}" + (f" ± {half:.3g}" if half > 0 else "")
        parts.append(f'<circle class="dot s0" cx="{x:.1f}" cy="{y}" r="4"><title>{escape(title)}</title></circle>')
    return _figure(parts, x_label, height=height)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def scatter(groups: Sequence[tuple[str, np.ndarray]], x_label: str, y_label: str) -> Markup:
    """Points of several groups, each [N, 2]. Both axes have one scale."""
    points = np.concatenate([group for _, group in groups])
    low, high = points.min(axis=0), points.max(axis=0)
    size = max(float((high - low).max()), 1e-9) * 1.06
    middle = (low + high) / 2
    side = 420
    x_axis = Axis(float(middle[0] - size / 2), float(middle[0] + size / 2), (LEFT, side - RIGHT))
    y_axis = Axis(float(middle[1] - size / 2), float(middle[1] + size / 2), (side - BOTTOM, TOP))
    parts = [_grid(x_axis, y_axis, x_label, y_label)]
    for place, (name, group) in enumerate(groups):
        dots = "".join(f"M{x_axis.place(x):.1f} {y_axis.place(y):.1f}h0" for x, y in group.tolist())
        parts.append(f'<path class="dots s{place}" d="{dots}"><title>{escape(name)}</title></path>')
    names = [Series(name, [], []) for name, _ in groups]
    return _figure(parts, "scatter plot", legend(names), side, side)


def legend(series: Sequence[Series]) -> Markup:
    """Empty for a single series."""
    if len(series) < 2:
        return Markup()
    items = [
        f'<li><i class="s{i % COLORS}{" dashed" if one.dashed or i >= COLORS else ""}"></i>{escape(one.name)}</li>'
        for i, one in enumerate(series)
    ]
    return Markup(f'<ul class="legend">{"".join(items)}</ul>')


def thinned(one: Series) -> Series:
    """The series with MOST_POINTS points at most, evenly chosen, with the first and the last one."""
    if len(one.x) <= MOST_POINTS:
        return one
    kept = np.unique(np.linspace(0, len(one.x) - 1, MOST_POINTS).astype(int)).tolist()
    spread = [one.spread[i] for i in kept] if one.spread else []
    return Series(one.name, [one.x[i] for i in kept], [one.y[i] for i in kept], spread, one.dashed)


def _line(one: Series, place: int, x_axis: Axis, y_axis: Axis) -> str:
    points = [(x_axis.place(x), y_axis.place(y)) for x, y in zip(one.x, one.y, strict=True)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    style, dashed = f"s{place % COLORS}", " dashed" if one.dashed or place >= COLORS else ""
    parts = [f'<path class="line {style}{dashed}" d="{path}"/>'] if len(points) > 1 else []
    for (px, _), y, spread in zip(points, one.y, one.spread or [0.0] * len(one.y), strict=True):
        if spread > 0:
            top, bottom = y_axis.place(y + spread), y_axis.place(y - spread)
            parts.append(f'<path class="whisker {style}" d="M{px - 4:.1f} {top:.1f}h8m-4 0V{bottom:.1f}m-4 0h8"/>')
    few = len(points) <= 60
    for (px, py), x, y in zip(points, one.x, one.y, strict=True):
        label = f"{one.name}: {y:.4g} at {x:g}" if one.name else f"{y:.4g} at {x:g}"
        parts.append(
            f'<circle class="{"dot" if few else "hit"} {style}" cx="{px:.1f}" cy="{py:.1f}" r="{3 if few else 5}">'
            f"<title>{escape(label)}</title></circle>"
        )
    return "".join(parts)


def _grid(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> str:
    left, right = x_axis.pixels
    bottom, top = y_axis.pixels
    parts = []
    for tick in y_axis.ticks():
        y = y_axis.place(tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    parts.append(_x_axis(x_axis, bottom, x_label))
    middle = (top + bottom) / 2
    parts.append(f'<text class="name" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
                 f"{escape(y_label)}</text>")  # fmt: skip
    return "".join(parts)


def _x_axis(axis: Axis, bottom: float, label: str, grid_top: float | None = None) -> str:
    """grid_top: where vertical grid lines end; None draws none."""
    left, right = axis.pixels
    parts = []
    for tick in axis.ticks():
        x = axis.place(tick)
        if grid_top is not None:
            parts.append(f'<path class="grid" d="M{x:.1f} {bottom}V{grid_top}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_number(tick, axis.log)}</text>')
    name = f'<text class="name" x="{(left + right) / 2}" y="{bottom + 33}" text-anchor="middle">{escape(label)}</text>'
    return "".join([*parts, f'<path class="axis" d="M{left} {bottom}H{right}"/>', name])


def _figure(parts: Sequence[str], label: str, below: str = "", width: int = WIDTH, height: int = HEIGHT) -> Markup:
    return Markup(
        f'<div class="chart"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>{below}</div>"
    )


def _range(values: Sequence[float], margin: float, log: bool = False) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if log:
        factor = max(high / low, 1.0) ** margin if high > low else 2.0
        return low / factor, high * factor
    if low == high:
        return low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    return low - margin * (high - low), high + margin * (high - low)


def _nice_step(step: float) -> float:
    """The next larger of 1, 2, 2.5 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= step * 0.999)


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of two, or of ten in a wide range; every second one if there are many."""
    base = 10 if high / low > 2000 or low < 1 else 2
    first = math.ceil(math.log(low, base) - 1e-9)
    last = math.floor(math.log(high, base) + 1e-9)
    every = max(1, (last - first) // 6 + (last - first > 6))
    return [float(base) ** i for i in range(first, last + 1, every)] or [low]


def _number(value: float, exact: bool = False) -> str:
    """Short, such as 12k for 12000, unless it has to be exact."""
    if exact and value >= 1:
        return f"{value:,.0f}"
    value = 0.0 if abs(value) < 1e-12 else value
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"
