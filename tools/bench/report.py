"""What was measured: rows as JSON and as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .cases import STAGES, Case
from .timing import Times

NOTHING = "-"


@dataclass
class Measured:
    """One side of a row. Seconds; FLOP/s; bytes, above the process as it was before the weights came."""

    median: float | None = None
    spread: float | None = None  # half of the way from the quickest to the slowest, as a share of the median
    first: float | None = None  # the round that also does what is done once
    seconds: list[float] | None = None
    flops_per_second: float | None = None
    share_of_peak: float | None = None  # of a large product's FLOP/s
    memory: int | None = None
    memory_above_weights: int | None = None
    load_seconds: float | None = None  # from the file, which the system has in memory, to networks that can work
    cold_seconds: float | None = None  # from the file to the end of the first round,
    cold_compile_seconds: float | None = None  # or, where that compiles from nothing, the same
    import_seconds: float | None = None  # of what is imported before that
    load_memory: int | None = None  # the peak while loading,
    load_private: int | None = None  # and what of it the process shares with no file
    optimizer: float | None = None  # of a training step's median, the optimiser's
    error: float | None = None  # of the output: |x - exact| / |exact|, exact being the peer's in fp32

    def fill(self, times: Times, work: int, peak: float) -> None:
        """Take over the times of rounds of `work` FLOP, on a machine that can do `peak` FLOP/s."""
        self.median, self.spread, self.first, self.seconds = times.median, times.spread, times.first, times.seconds
        self.flops_per_second = work / times.median
        self.compare(peak)

    def compare(self, peak: float) -> None:
        """Say what share of `peak` FLOP/s it reached."""
        if self.flops_per_second is not None:
            self.share_of_peak = self.flops_per_second / peak

    def remember(self, found: dict[str, Any], weights: int, loading: bool, compiled: bool) -> None:
        """Take over what a process of its own found."""
        self.memory = found["peak"]
        self.memory_above_weights = None if self.memory is None else self.memory - weights
        if loading:
            self.load_seconds, self.import_seconds = found["load_seconds"], found["import_seconds"]
            setattr(self, "cold_compile_seconds" if compiled else "cold_seconds", found["first_seconds"])
            self.load_memory, self.load_private = found["load_peak"], found["load_private"]


@dataclass
class Row:
    """A case, and what was measured of it."""

    case: Case
    flops: int  # of one round of ours, by the peer's network
    weights: int  # bytes
    ours: Measured = field(default_factory=Measured)
    peer: Measured | None = None
    difference: float | None = None  # of the outputs: |ours - peer| / |peer|

    def ratio(self, name: str, upwards: bool = False) -> float | None:
        """The peer's number to ours, or (`upwards`) ours to the peer's."""
        ours, peer = getattr(self.ours, name), None if self.peer is None else getattr(self.peer, name)
        if not ours or not peer:
            return None
        return ours / peer if upwards else peer / ours

    def samples_per_second(self, side: Measured | None) -> float | None:
        """Of a side that trains."""
        if side is None or side.median is None or not STAGES[self.case.stage].learns:
            return None
        return self.case.batch / side.median

    def times_faster_alike(self) -> float | None:
        """How many times faster a training step would be if the peer had our optimiser."""
        ours, peer = self.ours, self.peer
        if peer is None or not ours.median or not peer.median or ours.optimizer is None or peer.optimizer is None:
            return None
        return (peer.median - peer.optimizer + ours.optimizer) / ours.median

    def as_dict(self) -> dict[str, Any]:
        case = asdict(self.case)
        sides = {"ours": asdict(self.ours), "peer": None if self.peer is None else asdict(self.peer)}
        ratios = {
            "times_faster": self.ratio("median"),
            "times_faster_with_our_optimizer": self.times_faster_alike(),
            "samples_per_second": self.samples_per_second(self.ours),
            "peer_samples_per_second": self.samples_per_second(self.peer),
            "memory_ratio": self.ratio("memory", upwards=True),
            "load_times_faster": self.ratio("load_seconds"),
            "cold_times_faster": self.ratio("cold_seconds"),
            "cold_compile_times_faster": self.ratio("cold_compile_seconds"),
        }
        told = {"flops": self.flops, "weights": self.weights, "difference": self.difference}
        return {**case, **told, **ratios, **sides}


@dataclass
class Report:
    """All that a run found."""

    machine: dict[str, Any]
    peaks: dict[str, float] = field(default_factory=dict)  # by dtype: FLOP/s of a large product
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        rows = [row.as_dict() for row in self.rows]
        return {"machine": self.machine, "gemm_flops_per_second": self.peaks, "notes": self.notes, "rows": rows}

    def text(self) -> str:
        """For people: a Markdown table between what it was measured on and what is to be known of it."""
        machine = self.machine
        peaks = ", ".join(f"{peak / 1e12:.2f} TFLOP/s in {dtype}" for dtype, peak in self.peaks.items())
        packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
        return "\n".join(
            [
                f"{machine['processor']}, {machine['device']}, {machine['threads']} threads; {packages}",
                f"a large matrix product: {peaks}",
                "",
                table(self.rows),
                *(["", *self.notes] if self.notes else []),
            ]
        )


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown, without columns in which nothing was measured."""
    head = (
        "stage", "pixels", "batch", "dtype", "ours s", "peer s", "times faster", "with our optimiser", "ours samples/s",
        "peer samples/s", "ours TFLOP/s", "of GEMM peak",
        "difference", "ours off fp32", "peer off fp32", "ours GB", "peer GB", "memory ratio", "above weights GB",
        "peer above", "load s", "peer load s", "cold s", "peer cold s", "cold s, compiling", "peer cold s, compiling",
        "load private, of weights", "peer's",
    )  # fmt: skip
    lines = [[*head], ["---" if i in (0, 3) else "---:" for i in range(len(head))], *map(_cells, rows)]
    return aligned(_without_empty(lines))


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table that also reads well as it is."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"| {' | '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))} |" for line in lines)


def _without_empty(lines: list[list[str]]) -> list[list[str]]:
    """The columns in which something was measured."""
    kept = [i for i in range(len(lines[0])) if any(line[i] != NOTHING for line in lines[2:])]
    return [[line[i] for i in kept] for line in lines]


def _cells(row: Row) -> list[str]:
    case, ours, peer = row.case, row.ours, row.peer or Measured()
    return [
        case.stage,
        f"{case.side}²",
        str(case.batch),
        case.dtype,
        _time(ours),
        _time(peer),
        _number(row.ratio("median"), "{:.2f}x"),
        _number(row.times_faster_alike(), "{:.2f}x"),
        _number(row.samples_per_second(ours), "{:.3g}"),
        _number(row.samples_per_second(peer), "{:.3g}"),
        _number(ours.flops_per_second, "{:.2f}", 1e12),
        _number(ours.share_of_peak, "{:.0%}"),
        _number(row.difference, "{:.1e}"),
        _number(ours.error, "{:.1e}"),
        _number(peer.error, "{:.1e}"),
        _number(ours.memory, "{:.2f}", 1e9),
        _number(peer.memory, "{:.2f}", 1e9),
        _number(row.ratio("memory", upwards=True), "{:.2f}x"),
        _number(ours.memory_above_weights, "{:.2f}", 1e9),
        _number(peer.memory_above_weights, "{:.2f}", 1e9),
        _number(ours.load_seconds, "{:.2f}"),
        _number(peer.load_seconds, "{:.2f}"),
        _number(ours.cold_seconds, "{:.2f}"),
        _number(peer.cold_seconds, "{:.2f}"),
        _number(ours.cold_compile_seconds, "{:.2f}"),
        _number(peer.cold_compile_seconds, "{:.2f}"),
        _number(ours.load_private, "{:.0%}", row.weights),
        _number(peer.load_private, "{:.0%}", row.weights),
    ]


def _time(side: Measured) -> str:
    if side.median is None:
        return NOTHING
    return f"{side.median:.3g}" + ("" if side.spread is None else f" ±{side.spread:.0%}")


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return NOTHING if value is None else form.format(value / unit)
