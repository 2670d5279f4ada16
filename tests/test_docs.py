"""The docs name what the code has: tables and columns, states, error codes, commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from contract.breaking import breaking
from contract.document import PAGE, generated, kept, plain, text
from typer.main import get_command

from app.tables import Table
from bench.probe import table
from bench.report import newest
from fedselect.cli import build
from fedselect.lifecycle import AssignmentState, RoundState, RunState

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CODE = re.compile(
    r"""(?:code|reason)\s*=\s*"([a-z_]+)\"|title, code = \d+, "[^"]+", "([a-z_]+)\""""
)
FORMS = ("run_", "round_", "assignment_")  # codes that end in a state


def _codes() -> set[str]:
    files = [p for d in ("app", "workers", "fedselect") for p in (ROOT / d).rglob("*.py")]
    found = {a or b for p in files for a, b in CODE.findall(p.read_text())}
    assert len(found) > 50, "the pattern no longer finds the codes"
    return found


def test_every_error_code_is_documented():
    text = (DOCS / "ERRORS.md").read_text()
    missing = {code for code in _codes() if f"`{code}`" not in text}
    assert not missing


def test_no_documented_code_has_died():
    text = (DOCS / "ERRORS.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {code for row in rows for code in re.findall(r"`([a-z_]+)`", row)}
    sources = "".join(
        p.read_text() for d in ("app", "workers", "fedselect") for p in (ROOT / d).rglob("*.py")
    )
    assert not {code for code in named if f'"{code}"' not in sources}


@pytest.mark.parametrize("table", Table.metadata.sorted_tables, ids=lambda t: t.name)
def test_every_table_and_column_is_documented(table):
    text = (DOCS / "DATA-MODEL.md").read_text()
    section = text.partition(f"## `{table.name}`")[2].partition("\n## ")[0]
    assert section, f"no section for {table.name}"
    documented = re.findall(r"^- `(\w+)`", section, re.MULTILINE)
    assert documented == [column.name for column in table.columns]


@pytest.mark.parametrize("state", [*AssignmentState, *RoundState, *RunState])
def test_every_state_is_documented(state):
    assert f"`{state.value}`" in (DOCS / "ROUND-CYCLE.md").read_text()


def test_every_command_is_documented():
    def names(command: object, prefix: str) -> list[str]:
        below = getattr(command, "commands", None)
        if below is None:
            return [prefix]
        return [n for k, c in below.items() for n in names(c, f"{prefix} {k}")]

    pages = "".join(p.read_text() for p in [ROOT / "README.md", *DOCS.glob("*.md")])
    commands = names(get_command(build()), "fedselect")
    assert len(commands) > 6
    assert not [c for c in commands if c not in pages]


def test_adrs_are_short_and_say_what_enforces_them():
    adrs = sorted((DOCS / "adr").glob("*.md"))
    assert [p.name[:4] for p in adrs] == [f"{n:04}" for n in range(1, len(adrs) + 1)]
    for adr in adrs:
        text = adr.read_text()
        assert len(text.splitlines()) <= 60, adr.name
        for part in ("**Context.**", "**Decision.**", "**What enforces it.**"):
            assert part in text, (adr.name, part)


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_description_of_the_interface_is_the_one_that_is_served():
    found = breaking(plain(kept()), plain(generated()))
    assert not found, "this breaks clients (docs/INTEGRATORS.md); if it is meant: BREAKING=1"
    assert PAGE.read_text() == text(generated()), "additions only; renew it: make openapi"


POINTER = re.compile(r"`(?:(tests/[\w/]+\.py))?::(\w+)`")


def test_every_claim_about_privacy_points_to_a_test_that_exists():
    text = (DOCS / "PRIVACY.md").read_text()
    section = text.partition("## Promises")[2].partition("\n## ")[0]
    claims = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(claims) > 15
    assert not [claim for claim in claims if not POINTER.search(claim)]
    file = ""
    for named, test in POINTER.findall(text):
        file = named or file  # `::name` is in the file that was named last
        assert (ROOT / file).is_file(), file
        assert f"def {test}(" in (ROOT / file).read_text(), (file, test)


def test_the_table_of_what_masks_tell_is_the_newest_that_was_measured():
    lines = (DOCS / "bench-results.jsonl").read_text().splitlines()
    (line,) = [each for each in newest(map(json.loads, lines)) if each["bench"] == "probe"]
    _, _, rest = (DOCS / "PRIVACY.md").read_text().partition("<!-- probe: begin -->\n")
    assert rest.partition("<!-- probe: end -->")[0].strip() == table(line)


def test_the_table_of_what_attacks_do_is_the_newest_that_was_measured():
    from bench import attacks  # imports torch

    lines = (DOCS / "bench-results.jsonl").read_text().splitlines()
    (line,) = [each for each in newest(map(json.loads, lines)) if each["bench"] == "attacks"]
    assert line["form"] == "full"
    _, _, rest = attacks.PAGE.read_text().partition(attacks.BEGIN)
    assert rest.partition(attacks.END)[0] == attacks.table(line)
