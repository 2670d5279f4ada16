"""Pages in a real browser: they are drawn, and their policy refuses nothing of them."""

from __future__ import annotations

import shutil
import subprocess
import zlib

import pytest
import test_explaining
from report_samples import sample

from fedselect import explainpage, pictures, reportpage

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAGES = {
    "report": (lambda: reportpage.page(sample()), 11),
    "explanation": (lambda: explainpage.page(test_explaining.sample()), 2),
}


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("THE PAGE WAS NOT OPENED: no chromium on PATH (apt install chromium)")
    return found


@pytest.fixture(scope="module", params=PAGES)
def opened(request, browser, tmp_path_factory):
    """What the browser made of a page: its document, what it complained of, its picture, its
    number of plots.
    """
    folder = tmp_path_factory.mktemp("page")
    write, plots = PAGES[request.param]
    page = folder / "page.html"
    page.write_text(write(), "utf-8")

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr"]
        command += ["--window-size=1000,3000", *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    done = run("--dump-dom")
    run(f"--screenshot={folder / 'page.png'}")
    return done.stdout, done.stderr, (folder / "page.png").read_bytes(), plots


def test_it_keeps_all_plots_and_runs_nothing(opened):
    document, complaints, _, plots = opened
    assert document.count("<svg") == document.count("</svg>") == plots
    assert "Refused to" not in complaints
    assert "violates the following Content Security Policy" not in complaints


def shades(picture: bytes) -> set[int]:
    data, at = b"", 8
    while at < len(picture):
        size = int.from_bytes(picture[at : at + 4], "big")
        if picture[at + 4 : at + 8] == b"IDAT":
            data += picture[at + 8 : at + 8 + size]
        at += size + 12
    return set(zlib.decompress(data))


def size(picture: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))


def test_its_picture_is_not_empty(opened):
    assert size(opened[2]) == (1000, 3000)
    assert len(shades(opened[2])) > 100, "text and plots have many shades, an empty page has few"


def test_all_plots_in_one_picture(browser, tmp_path):
    page, path = reportpage.page(sample()), tmp_path / "plots.png"
    pictures.draw(page, path)
    assert size(path.read_bytes()) == (
        pictures.WIDTH + 2 * pictures.MARGIN,
        pictures.sheet(page)[1],
    )
    assert len(shades(path.read_bytes())) > 100
