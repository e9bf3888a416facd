"""The report page: it needs nothing else, shows names as they are, and fits a phone in a real browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from made_up_results import Results, compare

from nnunet_ssl.evaluation.figures import scatter, short


def test_names_are_no_formulas_and_plots_have_no_background(results):
    for file in (*results.results.glob("*/dataset.json"), results.raw / "dataset.json"):
        content = json.loads(file.read_text())
        content["labels"] = {"background": 0, "a$\\foo$ <b>": 1, "square": 2}
        file.write_text(json.dumps(content))
    assert compare(results) == 0
    page = (results.root / "out" / "report.html").read_text()
    assert "<b>" not in page
    assert "fill: #ffffff" not in page


def test_a_legend_shows_every_name():
    names = ["nnUNetTrainer", "_mine", "b" * 50 + "c" * 50]
    figure = scatter(np.arange(3.0), np.arange(6.0).reshape(2, 3), names, "Dice")
    for name in names[1:]:
        assert short(name).strip() in figure
    assert short(names[2]).endswith("cc")


class Links(HTMLParser):
    """Collects everything that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("src", "href", "xlink:href", "data", "srcset")
        self.found += [value or "" for name, value in attrs if name in names]


def test_the_page_needs_nothing_else(results: Results):
    assert compare(results) == 0
    page = (results.root / "out" / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.found) > 3
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links.found)
    assert "url(" not in page.replace("url(#", "")
    for text in ("won / tied / lost", "Worst cases", "Outlines", "Learning curves", "consistency", "num_epochs"):
        assert text in page


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Writes into the page's title what the browser measured.
PROBE = """<script>addEventListener('load', () => {
  const broken = [...document.images].filter(i => !i.complete || i.naturalWidth === 0).length;
  const root = document.documentElement;
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.wide') && !e.closest('svg')
    && e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.tagName);
  document.title = JSON.stringify({width: innerWidth, scroll: root.scrollWidth, broken, images: document.images.length,
    plots: [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height > 40).length, wide});
});</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [380, 1400])
def test_the_page_in_a_browser(results: Results, width: int):
    assert compare(results) == 0
    page = (results.root / "out" / "report.html").read_text()
    # Headless Chromium's window is never narrower than 500 pixels: a frame of the asked width holds the page.
    probed = results.root / "probed.html"
    probed.write_text(page.replace("</body>", PROBE + "</body>"))
    outer = results.root / "outer.html"
    outer.write_text(
        f'<iframe src="probed.html" style="border:0;width:{width}px;height:800px" '
        f'onload="setTimeout(() => document.title = this.contentDocument.title, 500)"></iframe>'
    )
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"),
        *("--window-size=1600,1000", "--virtual-time-budget=5000", "--dump-dom", outer.as_uri()),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    measured = json.loads(dom.split("<title>")[1].split("</title>")[0].replace("&quot;", '"'))
    assert measured["width"] == width
    assert measured["scroll"] <= width, measured
    assert measured["wide"] == []
    assert measured["broken"] == 0
    assert measured["images"] == 3
    assert measured["plots"] == page.count("<svg")
