"""Results as JSON and as a Markdown table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .cases import Case

EMPTY = "-"


@dataclass
class Measured:
    """One side of a row, in seconds and bytes; None where nothing was measured."""

    seconds: list[float]  # of each round
    memory: int | None = None  # peak above the process without networks

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the range of the seconds, as a fraction of their median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median


@dataclass
class Row:
    """The results of one case."""

    case: Case
    weights: int  # bytes
    ours: Measured
    peer: Measured | None = None
    difference: float | None = None  # of the outputs: |ours - peer| / |peer|

    @property
    def times_faster(self) -> float | None:
        return None if self.peer is None else self.peer.median / self.ours.median

    @property
    def memory_ratio(self) -> float | None:
        """Ours divided by the peer's."""
        ours, peer = self.ours.memory, getattr(self.peer, "memory", None)
        return ours / peer if ours and peer else None

    def as_dict(self) -> dict[str, Any]:
        ratios = {"times_faster": self.times_faster, "memory_ratio": self.memory_ratio}
        values = asdict(self)
        for side in ("ours", "peer"):
            if values[side] is not None:
                values[side] |= {name: getattr(getattr(self, side), name) for name in ("median", "spread")}
        return {**values.pop("case"), **ratios, **values}


@dataclass
class Report:
    """All results of a run."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"machine": self.machine, "notes": self.notes, "rows": [row.as_dict() for row in self.rows]}

    def text(self) -> str:
        """Returns the machine, a Markdown table and the notes."""
        machine = self.machine
        packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
        head = f"{machine['processor']} ({', '.join(machine['instructions'])}), {machine['device']}, "
        head += f"{machine['threads']} threads; {packages}"
        return "\n".join([head, "", table(self.rows), "", *self.notes])

    def page(self) -> str:
        """Returns the text and all numbers as one page of Markdown."""
        numbers = json.dumps(self.as_dict(), indent=1)
        return f"# Würstchen's benchmark\n\n{self.text().rstrip()}\n\n```json\n{numbers}\n```\n"


def table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table without the columns in which nothing was measured."""
    if not rows:
        return "nothing was measured"
    columns = [[title, "---", *map(cell, rows)] for title, cell in COLUMNS.items()]
    return aligned(list(zip(*(column for column in columns if set(column[2:]) != {EMPTY}), strict=True)))


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Returns the cells as a Markdown table whose columns line up as plain text."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"| {' | '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))} |" for line in lines)


def _cell(form: str, value: Callable[[Row], Any], unit: float = 1) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        found = value(row)
        return EMPTY if found is None else form.format(found / unit)

    return cell


def _side(side: str, name: str, form: str, unit: float = 1) -> Callable[[Row], str]:
    return _cell(form, lambda row: getattr(getattr(row, side), name, None), unit)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "stage": lambda row: row.case.stage,
    "pixels": lambda row: f"{row.case.size}²",
    "batch": lambda row: str(row.case.batch),
    "dtype": lambda row: row.case.dtype,
    "compiled": lambda row: "yes" if row.case.compiled else EMPTY,
    "ours s": _side("ours", "median", "{:.3g}"),
    "±": _side("ours", "spread", "{:.0%}"),
    "peer s": _side("peer", "median", "{:.3g}"),
    "peer ±": _side("peer", "spread", "{:.0%}"),
    "times faster": _cell("{:.2f}x", lambda row: row.times_faster),
    "difference": _cell("{:.1e}", lambda row: row.difference),
    "weights GB": _cell("{:.2f}", lambda row: row.weights, 1e9),
    "ours GB": _side("ours", "memory", "{:.2f}", 1e9),
    "peer GB": _side("peer", "memory", "{:.2f}", 1e9),
    "memory ratio": _cell("{:.2f}x", lambda row: row.memory_ratio),
}
