"""The plots of a page as one PNG, drawn by a browser that is on this machine.

Owns the sheet that they are put on and the call. No drawing library is needed: the plots are SVG
already, and whoever wants a picture of them has a browser. Must not know what a plot shows.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from fedselect.errors import FedSelectError
from fedselect.plots import INK, WIDTH

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "microsoft-edge")
TIMEOUT = 120  # seconds
MARGIN, TITLE = 20, 30  # px
_PLOT = re.compile(
    r'<svg [^>]*viewBox="0 0 \d+ ([\d.]+)"[^>]*><title>(.*?)</title>(.*?)</svg>', re.S
)


def sheet(page: str) -> tuple[str, int]:
    """All plots of a page below each other as one SVG, and its height in px."""
    parts, top = [], MARGIN
    for height, title, inner in _PLOT.findall(page):
        size = float(height)
        parts.append(
            f'<text x="{MARGIN}" y="{top + 14}" font-size="15" fill="{INK}">{title}</text>'
        )
        box = f'viewBox="0 0 {WIDTH} {size}" width="{WIDTH}" height="{size}"'
        parts.append(f'<svg x="{MARGIN}" y="{top + TITLE}" {box}>{inner}</svg>')
        top += round(size) + TITLE + MARGIN
    width = WIDTH + 2 * MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" '
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return f'{head}font-family="sans-serif">{ground}{"".join(parts)}</svg>', top


def draw(page: str, path: Path) -> None:
    """Write all plots of a page to a PNG file.

    Raises:
        FedSelectError: ``browser_missing``; ``browser_failed``, with its last words.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise FedSelectError(
            f"a PNG is drawn by a browser, and none of {', '.join(BROWSERS)} is on PATH; "
            "write the page with --html and print it from any browser",
            code="browser_missing",
        )
    drawing, height = sheet(page)
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "plots.svg", Path(folder) / "plots.png"
        source.write_text(drawing, "utf-8")
        command = [browser, "--headless", "--disable-gpu", "--hide-scrollbars"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium refuses to root
        command += [
            f"--user-data-dir={folder}/profile",
            f"--window-size={WIDTH + 2 * MARGIN},{height}",
        ]
        command += [f"--screenshot={target}", source.as_uri()]
        try:
            # All of it is ours: a program that was found on PATH, and a file that we wrote.
            done = subprocess.run(  # noqa: S603
                command, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
            words = done.stderr
        except (OSError, subprocess.TimeoutExpired) as error:
            words = str(error)
        if not target.exists():
            raise FedSelectError(
                f"{browser} drew nothing: {words.strip()[-300:]}", code="browser_failed"
            )
        shutil.copyfile(target, path)
