"""Plots and sheets of images, as PNG files. matplotlib is imported by the first of them: most workers plot nothing."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNINTERESTING = ("step", "samples_per_s", "seconds_per_step", "bad_samples")


def curves_png(history: list[dict[str, Any]]) -> bytes:
    """Training curves: one panel per logged number."""
    names = [name for name in dict.fromkeys(name for row in history for name in row) if name not in UNINTERESTING]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = _figure(figsize=(4 * columns, 2.6 * rows))
    for place, name in enumerate(names, start=1):
        axis = figure.add_subplot(rows, columns, place)
        logged = [row for row in history if name in row]
        axis.plot([row["step"] for row in logged], [row[name] for row in logged])
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    return _png(figure)


def sheet_png(pairs: list[tuple[bytes, ...]], per_row: int = 4) -> bytes:
    """Originals (left) beside reconstructions (right), `per_row` pairs in a row. pairs: PNG files."""
    rows = -(-len(pairs) // per_row)
    figure = _figure(figsize=(3.6 * per_row, 1.9 * rows))
    axes = np.ravel(figure.subplots(rows, 2 * per_row))
    for axis in axes:
        axis.axis("off")
    for axis, png in zip(axes, (png for pair in pairs for png in pair), strict=False):
        axis.imshow(image_array(png))
    return _png(figure)


def gallery_png(rows: list[tuple[str, list[bytes]]]) -> bytes:
    """A row of images for each label. rows: label and PNG files; all rows show the same images."""
    columns = max(len(pictures) for _, pictures in rows)
    figure = _figure(figsize=(2 + 1.3 * columns, 1.35 * len(rows)))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, pictures) in zip(axes, rows, strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, png in zip(row, pictures, strict=False):
            axis.imshow(image_array(png), interpolation="nearest")
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    return _png(figure)


def against_png(rows: list[dict[str, Any]], x: str, xlabel: str, shown: list[str]) -> bytes:
    """A panel for each column in `shown`, plotted against x: a line per method, with bars of one standard deviation.

    If x has a single value, the methods are listed below each other instead.
    """
    figure = _figure(figsize=(4.2 * len(shown), 3.8))
    axes = np.ravel(figure.subplots(1, len(shown)))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    listed = len({row[x] for row in rows if x in row}) == 1
    for axis, name in zip(axes, shown, strict=True):
        for place, method in enumerate(methods):
            own = sorted((row for row in rows if row["method"] == method and name in row), key=lambda row: row[x])
            spread = np.nan_to_num([row.get(f"{name}_sd", 0.0) for row in own])
            xs, ys = [row[x] for row in own], [row[name] for row in own]
            style = {"color": f"C{place % 10}", "marker": "osD^"[place // 10 % 4], "capsize": 2, "markersize": 4}
            if listed:
                axis.errorbar(ys, [place] * len(ys), xerr=spread, linestyle="none", **style)
            else:
                axis.errorbar(xs, ys, yerr=spread, label=method, **style)
        axis.grid(alpha=0.3)
        axis.set(title=name, xlabel="" if listed else xlabel)
        if listed:
            axis.set(yticks=range(len(methods)), yticklabels=methods if axis is axes[0] else [])
            axis.invert_yaxis()
        else:
            axis.set_xscale("log", base=2)
    if not listed:
        axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def image_array(png: bytes) -> np.ndarray:
    """A PNG file as an array [H, W, 3 or 4] of float32 in 0..1."""
    import matplotlib.image

    return matplotlib.image.imread(io.BytesIO(png))


def _figure(figsize: tuple[float, float]) -> "Figure":
    """An empty figure, which needs no display. figsize: width and height in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    return Figure(figsize=figsize, layout="constrained")


def _png(figure: "Figure") -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
