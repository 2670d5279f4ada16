"""The page of a report in a real browser: it is drawn, and its policy refuses nothing of it."""

from __future__ import annotations

import shutil
import subprocess
import zlib

import pytest
from report_samples import sample

from fedselect import reportpage

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("THE PAGE WAS NOT OPENED: no chromium on PATH (apt install chromium)")
    return found


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """What the browser made of a page: its document, what it complained of, its picture."""
    folder = tmp_path_factory.mktemp("page")
    page = folder / "report.html"
    page.write_text(reportpage.page(sample()), "utf-8")

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr"]
        command += ["--window-size=1000,3000", *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    done = run("--dump-dom")
    run(f"--screenshot={folder / 'page.png'}")
    return done.stdout, done.stderr, (folder / "page.png").read_bytes()


def test_it_keeps_all_plots_and_runs_nothing(opened):
    document, complaints, _ = opened
    assert document.count("<svg") == document.count("</svg>") == 7
    assert "Refused to" not in complaints
    assert "violates the following Content Security Policy" not in complaints


def test_its_picture_is_not_empty(opened):
    picture = opened[2]
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1000, 3000)
    data, at = b"", 8
    while at < len(picture):
        size = int.from_bytes(picture[at : at + 4], "big")
        if picture[at + 4 : at + 8] == b"IDAT":
            data += picture[at + 8 : at + 8 + size]
        at += size + 12
    shades = set(zlib.decompress(data))
    assert len(shades) > 100, "text and plots have many shades, an empty page has few"
