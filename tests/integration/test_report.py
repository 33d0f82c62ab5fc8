"""The report in a real browser: it renders, sorts, filters, fits a phone, and asks the network for nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sam_repro.paper.ledger_join import runs_of
from sam_repro.paper.render.report import report
from sam_repro.paper.spec import load_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from paper_rows import write_rows

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RESULTS = Path(__file__).resolve().parents[2] / "results"
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (apt-get install chromium)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page of the demo and Table 6, the first from stored test rows."""
    folder = tmp_path_factory.mktemp("report")
    table = load_table("demo")
    for row, counts in zip(table.rows, ([330, 333, 331], [338, 340, 337], [345, 343, 347]), strict=True):
        write_rows(folder / "ledger", runs_of(table, row), counts)
    (folder / "index.html").write_text(report(["demo", "table6"], folder / "ledger"))
    return folder


def browse(folder: Path, script: str = "", *, width: int = 1280) -> str:
    """What `script` puts into document.title, run in the page in an iframe as wide as the screen in question."""
    text = (folder / "index.html").read_text().replace("</body>", f"<script>{script}</script></body>")
    (folder / "page.html").write_text(text)
    frame = f'<iframe id=f src=page.html style="width:{width}px;height:900px;border:0"></iframe>'
    copy = "<script>f.onload = () => document.title = f.contentDocument.title</script>"
    (folder / "frame.html").write_text(frame + copy)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=3000", "--dump-dom", f"file://{folder}/frame.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]


def test_the_page_is_self_contained_and_reproducible(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    assert not re.findall(r"https?://", text) and "src=" not in text and "@import" not in text
    assert text == report(["demo", "table6"], folder / "ledger")
    assert "93.98 ± 1.05 (3)" in text and "76.8" in text and "pending" in text


@needs_browser
def test_it_fits_a_phone_and_a_desk(folder: Path) -> None:
    script = "document.title = document.documentElement.scrollWidth + '/' + innerWidth"
    for width in (360, 390, 1280):
        inner, outer = map(int, browse(folder, script, width=width).split("/"))
        assert outer == width and inner <= width


@needs_browser
def test_a_click_on_a_heading_sorts(folder: Path) -> None:
    script = """
      const table = document.querySelector('#demo table'), th = table.querySelectorAll('th')[2];
      const read = () => [...table.tBodies[0].rows].map(r => parseFloat(r.cells[2].textContent)).join(' ');
      th.click(); const up = read(); th.click(); document.title = up + '|' + read();"""
    up, down = browse(folder, script).split("|")
    assert up == "92.04 93.98 95.83" and down == "95.83 93.98 92.04"


@needs_browser
def test_the_filter_keeps_the_rows_that_hold_all_words(folder: Path) -> None:
    script = """
      const box = document.getElementById('filter'); box.value = 'digits gsam'; box.oninput();
      const seen = [...document.querySelectorAll('#demo tbody tr')].filter(r => !r.hidden).length;
      const runs = [...document.querySelectorAll('details.filterable')].filter(d => !d.hidden && /-s\\d-/.test(d.id));
      document.title = seen + ' ' + document.getElementById('table6').hidden + ' ' + runs.length;"""
    assert browse(folder, script) == "1 true 3"


@needs_browser
@pytest.mark.parametrize(("typed", "seen"), [("vit_b32 gsam", "1 true"), ("D-01", "5 true"), ("D-16", "1 true")])
def test_the_filter_knows_row_ids_and_deviations(folder: Path, typed: str, seen: str) -> None:
    script = f"""
      const box = document.getElementById('filter'); box.value = '{typed}'; box.oninput();
      document.title = [...document.querySelectorAll('#table6 tbody tr')].filter(r => !r.hidden).length + ' '
        + document.getElementById('demo').hidden;"""
    assert browse(folder, script) == seen


@needs_browser
def test_curves_are_drawn_inside_their_frames_and_links_lead_to_runs(folder: Path) -> None:
    script = """
      document.querySelectorAll('details').forEach(d => d.open = true);
      let bad = 0; document.querySelectorAll('polyline').forEach(p => { const b = p.getBBox();
        if (!(b.x >= 0 && b.y >= 0 && b.x + b.width <= 260 && b.y + b.height <= 120)) bad++; });
      const dead = [...document.querySelectorAll('a[href^="#"]')].filter(a => !document.querySelector(
        `[id="${a.getAttribute('href').slice(1)}"]`)).length;
      document.title = document.querySelectorAll('polyline').length + ' ' + bad + ' ' + dead;"""
    drawn, outside, dead = map(int, browse(folder, script).split())
    assert drawn >= 9 * 4 and outside == 0 and dead == 0


def test_the_page_opens_with_what_was_shown_and_claims_nothing_that_was_not_run(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    assert "Made so far: none. So no number of the papers has been reproduced yet." in text
    assert ">measured<" not in text and 'id="table6"' in text.split("<h3>Pending</h3>")[1]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page of everything that is in results/."""
    folder, figures = tmp_path_factory.mktemp("stored"), RESULTS / "figures"
    (folder / "index.html").write_text(report([], RESULTS / "runs", figures))
    return folder


def test_the_page_is_in_order(stored: Path) -> None:
    """Claims with effect and n, the picture, studies, the papers' tables with what is pending folded, the rest."""
    text = (stored / "index.html").read_text()
    order = ('id="claims"', 'class="plot evidence"', 'id="studies"', 'id="papers"', 'id="runs"', 'id="deviations"')
    places = [text.index(word) for word in order]
    assert places == sorted(places)
    claims = text[places[0] : places[1]]
    assert claims.count("(n = ") > 30 and "confirmed" in claims and "contradicted" in claims
    assert "reproduced" not in text.replace("no number of the papers has been reproduced yet", "")
    table1 = text[text.index('id="table1"') : text.index('id="table2"')]
    assert "0 of 108 runs" in table1 and "76.8" in table1 and ">difference<" not in table1
    assert text.rindex("<h3>Pending</h3>", 0, places[4]) < text.index('id="table1"') < places[4]


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_every_table_fits_the_desk_and_scrolls_on_a_phone(stored: Path, width: int) -> None:
    script = """
      document.querySelectorAll('details').forEach(d => d.open = true);
      const wide = [...document.querySelectorAll('.scroll')].filter(d => d.scrollWidth > d.clientWidth);
      document.title = wide.map(d => d.closest('details').id).join() + '/' + document.documentElement.scrollWidth;"""
    scrolling, inner = browse(stored, script, width=width).split("/")
    assert int(inner) <= width and (width < 1280 or not scrolling)


@needs_browser
def test_every_stored_figure_is_on_the_page_and_inside_it(stored: Path) -> None:
    script = """
      document.querySelectorAll('details').forEach(d => d.open = true);
      document.title = document.querySelectorAll('.plot svg').length + '/' + document.documentElement.scrollWidth;"""
    for width in (390, 1280):
        drawn, inner = map(int, browse(stored, script, width=width).split("/"))
        assert drawn == len(list((RESULTS / "figures").glob("*.svg"))) and inner <= width
