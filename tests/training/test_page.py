"""The page of a run: its chart, its grids and its configuration."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.recording_trainer import CONFIG, LineStage
from helpers.tiny_stages import read_log

from wuerstchen_core.training.chart import HEIGHT, LEFT, WIDTH, draw_chart, smooth
from wuerstchen_core.training.loop import train
from wuerstchen_core.training.page import PAGE


class Elements(HTMLParser):
    """Collects the elements of a page with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = self.heading = ""
        self.in_heading = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.in_heading = tag == "h1"
        self.found.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data
        self.heading += data if self.in_heading else ""

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_a_run_writes_its_page(tmp_path: Path) -> None:
    configuration = '[modelspec]\ntitle = "<script>alert(1)</script>"\n'
    (tmp_path / "config.toml").write_text(configuration, encoding="utf-8")
    start = {"time": "today", "device": "abacus", "versions": {"torch": "9.9", "peft": None}, "command": "train <b>"}
    (tmp_path / "starts.jsonl").write_text(json.dumps(start) + "\n", encoding="utf-8")
    (tmp_path / "sheet-000012.png").touch()  # of an earlier run in this folder
    train(LineStage(), CONFIG, tmp_path)
    text = (tmp_path / PAGE).read_text("utf-8")
    page = Elements(text)
    assert "http" not in text and len(page.all("script")) == 1 and configuration in page.text
    assert all(fact in page.text for fact in ("8 of 8", "abacus, torch 9.9", "train <b>")) and "peft" not in page.text
    assert "<script>alert(1)</script>" in page.heading
    [grids] = [json.loads(figure["data-grids"]) for figure in page.all("figure")]
    assert grids == [[4, "sheet-000004.png"], [8, "sheet-000008.png"]]
    assert [image["src"] for image in page.all("img")] == ["sheet-000008.png"]
    rows, lines = read_log(tmp_path), {line["class"]: line["points"].split() for line in page.all("polyline")}
    assert {name: len(points) for name, points in lines.items()} == {"training": len(rows), "mean": len(rows)}
    assert [link["href"] for link in page.all("a")] == ["prior.safetensors"]


def test_a_chart_has_larger_values_above_and_later_steps_to_the_right() -> None:
    chart = draw_chart({"a": [(0, 1.0), (10, 10.0), (20, 100.0)], "b": [(5, math.nan), (10, 0.0), (20, 10.0)]})
    assert chart is not None
    (x0, y0), (x1, y1), (x2, y2) = chart.lines["a"]
    assert x0 == LEFT < x1 < x2 <= WIDTH and HEIGHT > y0 > y1 > y2 >= 0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)  # logarithmic
    assert chart.lines["b"] == [(x2, y1)]
    assert [step for _, step in chart.steps] == [0, 5, 10, 15, 20]
    assert dict(map(reversed, chart.values))["10"] == y1


def test_a_chart_needs_a_positive_value() -> None:
    assert draw_chart({"a": [], "b": [(1, math.nan), (2, math.inf), (3, 0.0), (4, -1.0)]}) is None


@pytest.mark.parametrize("last", [0, 1, 7, 20, 999, 918_000])
@pytest.mark.parametrize("values", [(0.1, 0.1), (0.1512, 0.1513), (0.08, 1.0), (1e-7, 5e3)])
def test_a_chart_has_a_few_labels(last: int, values: tuple[float, float]) -> None:
    chart = draw_chart({"a": [(0, values[0]), (last, values[1])]})
    assert chart is not None
    assert 2 <= len(chart.steps) <= 7 and 1 <= len(chart.values) <= 12
    assert all(0 <= y <= chart.bottom for y, _ in chart.values)
    assert all(chart.left <= x <= chart.width for x, _ in chart.steps)


def test_smoothing_is_a_mean_of_the_last_thirtieth() -> None:
    line = [(float(i), float(i % 2)) for i in range(60)]
    assert smooth(line)[0] == (0, 0) and {y for _, y in smooth(line)[1:]} == {0.5}
