"""Coordinates of a line chart with a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, BOTTOM = 800, 320, 56, 28  # of the chart, and of the room for its labels
Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """Lines and labels of a chart, in pixels from its upper left corner."""

    lines: dict[str, list[Point]]
    steps: list[tuple[float, int]]  # x and number of each label below
    values: list[tuple[float, str]]  # y and number of each label on the left
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    bottom: int = HEIGHT - BOTTOM


def draw_chart(lines: Mapping[str, Sequence[Point]]) -> Chart | None:
    """Returns a chart of lines (step, value) by name; None if no value is finite and positive."""
    kept = {name: [(x, y) for x, y in line if 0 < y < math.inf] for name, line in lines.items()}
    points = [point for line in kept.values() for point in line]
    if not points:
        return None
    last = max(1.0, max(x for x, _ in points))
    low, high = (math.log10(limit(y for _, y in points)) for limit in (min, max))
    room = max(0.02, (high - low) * 0.05)
    low, high = low - room, high + room

    def place(x: float, y: float) -> Point:
        across, up = x / last, (math.log10(y) - low) / (high - low)
        return round(LEFT + across * (WIDTH - LEFT - 8), 1), round((1 - up) * (HEIGHT - BOTTOM), 1)

    return Chart(
        {name: [place(x, y) for x, y in line] for name, line in kept.items()},
        [(place(step, points[0][1])[0], step) for step in _steps(last)],
        [(place(0, y)[1], f"{y:g}") for y in _values(low, high)],
    )


def smooth(line: Sequence[Point]) -> list[Point]:
    """Returns the means over the last thirtieth of a line, at each of its points."""
    window = max(1, len(line) // 30)
    values = [y for _, y in line]
    recent = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [(x, sum(part) / len(part)) for (x, _), part in zip(line, recent, strict=True)]


def _steps(last: float) -> list[int]:
    """Returns about five round numbers from 0 to `last`."""
    unit = 10 ** math.floor(math.log10(last))
    every = next((x for x in (unit // 5, unit // 2, unit, 2 * unit) if x and last / x <= 6), 2 * unit)
    return list(range(0, int(last) + 1, max(1, int(every))))


def _values(low: float, high: float) -> list[float]:
    """Returns round numbers whose logarithms are from `low` to `high`: few if these are far apart."""
    for digits in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10)), tuple(x / 10 for x in range(10, 100))):
        numbers = [x * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for x in digits]
        inside = [x for x in numbers if low <= math.log10(x) <= high]
        if len(inside) >= 3:
            break
    return inside[:: 1 + len(inside) // 9]
