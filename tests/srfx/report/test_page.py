"""The report as a page: what it says, that it needs nothing else, and how it looks in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import srfx
from srfx.report.drawing import graph, strip
from tests.helpers import kill, randomized, trace

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
X = torch.randn(2, 6)
KEPT = (42, 111, 219)  # the colour of kept channels


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.branch = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        y = self.second(y).sort(-1).values + self.branch(y)
        return self.last(y)


def pruned() -> nn.Module:
    net = randomized(Net())
    kill(net.first, rows=[0, 1, 5])
    with torch.no_grad():
        net.branch.weight.zero_()
    return net


def small_model(route: str = "symbolic", multiple_of: int = 4) -> fx.GraphModule:
    return srfx.minimize(trace(pruned(), (X,), route), X, multiple_of=multiple_of)


class Checker(HTMLParser):
    """Every tag is closed, and nothing is fetched from anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_the_page_stands_alone(route: str, tmp_path: Path) -> None:
    small = small_model(route)
    report = srfx.report(small, pruned(), explain=True)
    report.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert "url(" not in page
    text = " ".join(checker.text)
    for expected in ("parameters", "measured latency", "first", "12x6", "revived", "sort", "FLOPs"):
        assert expected in text
    assert "first.weight, axis 0, channel 2" in text
    assert re.search(r"is read by \S+ \(", text)
    assert len(page) < 60_000


def test_other_forms(tmp_path: Path) -> None:
    report = srfx.report(small_model())
    for name in ("x.json", "x.txt"):
        report.save(tmp_path / name)
    assert (tmp_path / "x.json").read_text() == report.to_json()
    assert (tmp_path / "x.txt").read_text() == str(report)
    assert "measured latency" not in report.to_html()
    assert report.explained == {}
    assert "&lt;b&gt;" in report.to_html("<b>")


def test_kept_channels_as_runs() -> None:
    rows = {r.name: r for r in srfx.report(small_model(multiple_of=1)).layers}
    assert rows["first"].kept == (((2, 3), (6, 6)), ((0, 6),))
    assert rows["second"].kept == (((0, 8),), ((2, 3), (6, 6)))
    assert rows["branch"].kept == ((),)  # gone
    assert rows["branch"].shape_after is None


def test_the_graphs_are_those_of_the_models() -> None:
    small = small_model(multiple_of=1)
    report = srfx.report(small)
    assert list(report.edges_after) == [n.name for n in small.graph.nodes if n.op != "get_attr"]
    gone = set(report.edges_before) - set(report.edges_after)
    assert "branch" in gone
    assert report.ops["first"] == "Linear"
    assert report.to_html().count("removed") > 1


def test_drawings() -> None:
    drawn = strip(10, ((0, 2), (5, 1)))
    assert "3 of 10 channels stay" in drawn
    assert drawn.count('class="kept"') == 2
    many = {f"n{i}": [f"n{i - 1}"] if i else [] for i in range(500)}
    assert "and 100 more nodes" in graph(many, set(), "removed", {})
    assert "&lt;x&gt;" in graph({"<x>": []}, {"<x>"}, "added", {"<x>": "<op>"})


def test_latency_is_measured() -> None:
    found = srfx.report(small_model(), pruned()).latency_ms
    assert found is not None
    assert all(0 < t < 1000 for t in found)


@pytest.mark.slow
def test_the_figure(tmp_path: Path) -> None:
    made = srfx.report(small_model()).figure()
    made.savefig(tmp_path / "sizes.pdf")
    assert (tmp_path / "sizes.pdf").read_bytes()[:4] == b"%PDF"
    labels = [label.get_text() for label in made.axes[0].get_yticklabels()]
    assert labels == ["first", "second", "branch", "last"]


def browser(page: Path, *options: str) -> str:
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        *(
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-sync",
        ),
        *("--disable-background-networking", "--disable-component-update"),
        f"--user-data-dir={page.parent / 'profile'}",
        "--window-size=1200,1600",
        "--force-device-scale-factor=1",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian's package chromium)")
def test_in_a_browser(tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "report.html"
    srfx.report(small_model(), explain=True).save(path)
    dom = browser(path, "--dump-dom")
    assert dom.count("<tr") == path.read_text().count("<tr")
    assert dom.count("<rect") == path.read_text().count("<rect")
    picture = tmp_path / "report.png"
    browser(path, f"--screenshot={picture}", "--blink-settings=preferredColorScheme=1")
    pixels = torch.from_numpy(imread(picture))[..., :3].mul(255).round().int()
    assert pixels.shape == (1600, 1200, 3)
    blue = (pixels == torch.tensor(KEPT)).all(-1)
    rows, columns = blue.any(1).sum(), blue.any(0).sum()
    assert int(rows) > 40  # four layers with strips, and the bars of the totals
    assert int(columns) > 200
    assert float(blue.float().mean()) < 0.2
    ink = (pixels.float().mean(-1) < 100).any(0)
    assert not bool(ink[-8:].any())  # nothing runs off the page to the right
