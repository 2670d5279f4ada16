"""The plots of a page as a picture."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ET

import pytest
from report_samples import sample

from fedselect import pictures, plots, reportpage
from fedselect.errors import FedSelectError

SVG = "{http://www.w3.org/2000/svg}"


def test_a_sheet_holds_every_plot_below_its_title():
    page = reportpage.page(sample())
    text, height = pictures.sheet(page)
    sheet = ET.fromstring(text)
    drawn = sheet.findall(f"{SVG}svg")
    titles = sheet.findall(f"{SVG}text")
    assert len(drawn) == len(titles) == page.count("<svg")
    bottom = 0.0
    for title, plot in zip(titles, drawn, strict=True):
        assert bottom < float(title.get("y")) < float(plot.get("y"))
        assert float(plot.get("width")) == plots.WIDTH
        bottom = float(plot.get("y")) + float(plot.get("height"))
    assert bottom < height == int(sheet.get("height"))
    assert "Gain of each client against training alone" in titles[0].text


def test_without_a_browser_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FedSelectError, match="--html") as refusal:
        pictures.draw(reportpage.page(sample()), tmp_path / "plots.png")
    assert refusal.value.code == "browser_missing"


def test_a_browser_that_draws_nothing_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/false")
    with pytest.raises(FedSelectError, match="drew nothing") as refusal:
        pictures.draw(reportpage.page(sample()), tmp_path / "plots.png")
    assert refusal.value.code == "browser_failed"
    assert not (tmp_path / "plots.png").exists()
