"""Lines that carry their names: a style for each of many, and labels at their ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from matplotlib import patheffects, pyplot
from matplotlib.axes import Axes

WIDTH = 8.0  # inches: a little over the 800 pixels that a README shows
_COLORS = pyplot.colormaps["tab10"].colors  # type: ignore[attr-defined]
_MARKERS = "osD^vPX*<>hpd"
_DASHES = ("-", "--", ":", "-.")
_GAP = 11.0  # points from one label to the next
_LETTER = 4.5  # points, the usual width of a letter
_ROOM = 6.0  # points from the end of a line to its label
_HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]


def style(index: int, ours: bool) -> dict[str, Any]:
    """Line and marker of series ``index``: no two of the first 60 are alike. ``ours`` is drawn
    stronger."""
    dashes = "-" if ours else _DASHES[1 + index // len(_COLORS) % (len(_DASHES) - 1)]
    return {
        "color": _COLORS[index % len(_COLORS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "ls": dashes,
        "lw": 1.8 if ours else 1.1,
        "ms": 5,
    }


@dataclass
class _Label:
    text: str
    color: Any
    x: float  # the end of the line, pixels
    y: float
    place: float = 0.0  # where the label stands, pixels


@dataclass
class _Column:
    """Labels one above the other, beside the rightmost end of their lines."""

    labels: list[_Label]
    pixel: float  # a point, in pixels

    @property
    def x(self) -> float:
        return max(label.x for label in self.labels) + _ROOM * self.pixel

    def overlaps(self, other: _Column) -> bool:
        return all(
            mine[0] < theirs[1] and theirs[0] < mine[1]
            for mine, theirs in zip(self._box(), other._box(), strict=True)
        )

    def _box(self) -> tuple[tuple[float, float], tuple[float, float]]:
        width = max(len(label.text) for label in self.labels) * _LETTER * self.pixel
        half = _GAP / 2 * self.pixel
        places = [label.place for label in self.labels]
        return (self.x, self.x + width), (min(places) - half, max(places) + half)

    def spread(self, bottom: float, top: float) -> None:
        """Set the places: as near to the ends of the lines as the gap and the axes allow."""
        gap = _GAP * self.pixel
        self.labels.sort(key=lambda label: label.y)
        low = bottom
        for label in self.labels:
            label.place = max(label.y, low)
            low = label.place + gap
        high = top
        for label in reversed(self.labels):
            label.place = min(label.place, high)
            high = label.place - gap


def label_lines(axes: Axes, lines: Iterable[Any], gather: bool = False) -> None:
    """Write the name of each line beside its last point; names that would overlap, or with
    ``gather`` all names, share a column and are tied to their lines. To be called when limits and
    layout are final."""
    axes.figure.canvas.draw()
    (_, bottom), (_, top) = axes.transAxes.transform([(0, 0), (0, 1)])
    pixel = axes.figure.dpi / 72
    columns = []
    for line in lines:
        x, y = map(float, axes.transData.transform(line.get_xydata()[-1]))
        y = min(max(y, bottom), top)
        columns.append(_Column([_Label(str(line.get_label()), line.get_color(), x, y, y)], pixel))
    if gather:
        columns = [_Column([label for column in columns for label in column.labels], pixel)]
        columns[0].spread(bottom, top)
    for column in _merged(columns, bottom, top):
        for label in column.labels:
            _write(axes, label, column)


def _merged(columns: list[_Column], bottom: float, top: float) -> list[_Column]:
    """Columns that overlap made one, until none do."""
    for first, second in combinations(columns, 2):
        if first.overlaps(second):
            rest = [column for column in columns if column not in (first, second)]
            both = _Column(first.labels + second.labels, first.pixel)
            both.spread(bottom, top)
            return _merged([*rest, both], bottom, top)
    return columns


def _write(axes: Axes, label: _Label, column: _Column) -> None:
    far = column.x - label.x - _ROOM * column.pixel > column.pixel
    moved = far or abs(label.place - label.y) > 2 * column.pixel
    tie = {"arrowstyle": "-", "color": label.color, "lw": 0.6, "alpha": 0.7, "shrinkA": 0,
           "shrinkB": 3, "relpos": (0, 0.5)}  # fmt: skip
    axes.annotate(
        label.text,
        (label.x, label.y),
        (column.x + moved * 2 * _ROOM * column.pixel, label.place),
        xycoords="figure pixels",
        textcoords="figure pixels",
        color=label.color,
        fontsize=8,
        va="center",
        path_effects=_HALO,
        annotation_clip=False,
        arrowprops=tie if moved else None,
    )
