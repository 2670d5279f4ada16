"""Exported ledgers: every edit, deletion, move, cut and wrong signature is found and named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_samples import ORIGIN, OTHER, PUBLIC, export, signed, written

from fedselect import audit, merkle
from fedselect.errors import LedgerError

FAST = settings(max_examples=100, deadline=None, derandomize=True)
COUNT = 200
DOCUMENTS = export(COUNT)
LINES = written(DOCUMENTS)
SHORT = written(export(5))
SHORT_TEXT = "".join(SHORT)


def refused(lines: list[str], public_key: str | None = None) -> str:
    with pytest.raises(LedgerError) as caught:
        audit.verify_export(lines, public_key=public_key)
    return str(caught.value)


def test_an_honest_export():
    report = audit.verify_export(iter(LINES), public_key=PUBLIC)
    root = merkle.tree_root([bytes.fromhex(d["leaf"]) for d in DOCUMENTS[:-1]])
    assert report == audit.ExportReport(
        entries=COUNT,
        withheld=0,
        checkpoint=audit.Checkpoint(ORIGIN, COUNT, root),
        public_key=PUBLIC,
        pinned=True,
        heads=0,
    )
    assert audit.verify_export(LINES) == replace(report, pinned=False)


def test_neither_spacing_nor_order_of_keys_matters():
    rewritten = [
        json.dumps(dict(reversed(d.items())), separators=(" , ", " : "), ensure_ascii=False)
        for d in DOCUMENTS
    ]
    assert audit.verify_export(rewritten).entries == COUNT


def test_an_empty_ledger():
    assert audit.verify_export(written(export(0))).entries == 0


def change(path: str, value: object) -> Callable[[dict], None]:
    def apply(document: dict) -> None:
        *places, last = path.split(".")
        for place in places:
            document = document[place]
        document[last] = value

    return apply


EDITS = {
    "id": change("entry.id", 999_999),
    "at": change("entry.at", "2026-11-23T10:00:00Z"),
    "actor": change("entry.actor", "admin"),
    "action": change("entry.action", "key.revoked"),
    "subject": change("entry.subject", "another"),
    "project": change("entry.project", "another"),
    "body": change("entry.body.sha256", "00" * 32),
    "type in the body": change("entry.body.ok", 1),
    "new field": change("entry.note", ""),
    "new field in the body": change("entry.body.note", None),
    "field removed": lambda d: d["entry"].pop("actor"),
    "body removed": lambda d: d["entry"].pop("body"),
    "entry seq": lambda d: d["entry"].update(seq=d["seq"] + 1),
    "entry seq as text": lambda d: d["entry"].update(seq=str(d["seq"])),
    "entry seq as bool": lambda d: d["entry"].update(seq=bool(d["seq"])),
    "seq": lambda d: d.update(seq=d["seq"] + 1),
    "seq as text": lambda d: d.update(seq=str(d["seq"])),
    "seq as float": lambda d: d.update(seq=float(d["seq"])),
    "seq as null": change("seq", None),
    "leaf": lambda d: d.update(leaf=d["leaf"][::-1]),
    "leaf in capitals": lambda d: d.update(leaf=d["leaf"].upper()),
    "leaf cut": lambda d: d.update(leaf=d["leaf"][:-2]),
    "leaf as null": change("leaf", None),
    "entry as null": change("entry", None),
    "entry as list": change("entry", []),
    "line field added": change("extra", 1),
    "line field removed": lambda d: d.pop("leaf"),
    "float": change("entry.body.share", 0.5),
    "nan": change("entry.body.share", float("nan")),
    "huge integer": change("entry.body.share", 2**53),
    "surrogate": change("entry.actor", "\ud800"),
    "astral": change("entry.actor", "\U0001f600"),
}


def line_of(document: dict) -> str:
    if "entry" not in document:
        return json.dumps(document) + "\n"
    return (
        audit.export_line(document["seq"], bytes.fromhex(document["leaf"]), document["entry"])
        + "\n"
    )


CANONICAL = [line_of(document) for document in DOCUMENTS]


def test_export_lines_are_canonical_and_take_the_short_way(monkeypatch):
    assert [json.loads(line) for line in CANONICAL] == DOCUMENTS
    assert CANONICAL[7].encode() == rfc8785.dumps(DOCUMENTS[7]) + b"\n"
    expected = audit.verify_export(LINES, public_key=PUBLIC)
    monkeypatch.setattr(audit, "_checked_leaf", None)
    assert audit.verify_export(CANONICAL, public_key=PUBLIC) == expected
    bare = [line.rstrip("\n") for line in CANONICAL]
    assert audit.verify_export(bare, public_key=PUBLIC) == expected


@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_export_line_is_found_and_named(kind):
    for place in (0, 9, COUNT - 1):
        document = copy.deepcopy(DOCUMENTS[place])
        EDITS[kind](document)
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        lines = [*CANONICAL[:place], text + "\n", *CANONICAL[place + 1 :]]
        assert refused(lines).startswith(f"entry {place}:")


def test_moved_and_deleted_export_lines_are_found_and_named():
    for place in range(0, COUNT - 1, 3):
        swapped = CANONICAL.copy()
        swapped[place], swapped[place + 1] = swapped[place + 1], swapped[place]
        for lines in (swapped, CANONICAL[:place] + CANONICAL[place + 1 :], CANONICAL[:place]):
            assert refused(lines).startswith(f"entry {place}:")


@pytest.mark.parametrize("seq", [True, 1.0, "1", None, 2, [1]])
def test_an_entry_that_was_hashed_with_another_number(seq):
    """A sealer's mistake, not an edit: the leaf is right, the number in the entry is not."""
    spoiled_entry = DOCUMENTS[1]["entry"] | {"seq": seq}
    text = json.dumps(spoiled_entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    leaf = merkle.leaf_hash(text.encode()).hex()
    line = f'{{"entry":{text},"leaf":"{leaf}","seq":1}}\n'
    assert refused([CANONICAL[0], line, *CANONICAL[2:]]).startswith("entry 1:")


@pytest.mark.parametrize("text", ['{"seq":1,"seq":1}', '[{"seq":1}]', '{"seq":1', "1", "", "{}"])
def test_a_hashed_text_that_is_no_entry(text):
    leaf = merkle.leaf_hash(text.encode()).hex()
    line = f'{{"entry":{text},"leaf":"{leaf}","seq":1}}\n'
    assert refused([CANONICAL[0], line, *CANONICAL[2:]]).startswith("entry 1:")


def spoil(kind: str, place: int) -> None:
    document = copy.deepcopy(DOCUMENTS[place])
    EDITS[kind](document)
    lines = [*LINES[:place], json.dumps(document), *LINES[place + 1 :]]
    assert refused(lines).startswith(f"entry {place}:")


@pytest.mark.parametrize("kind", EDITS)
def test_every_kind_of_edit_is_found_and_named(kind):
    for place in (0, 1, 2, 7, 8, 63, 64, 127, COUNT - 1):
        spoil(kind, place)


def test_an_edit_of_any_line_is_found_and_named():
    for place, kind in zip(range(COUNT), cycle(EDITS), strict=False):
        spoil(kind, place)


def test_every_deleted_line_is_found_and_named():
    for place in range(COUNT):
        lines = LINES[:place] + LINES[place + 1 :]
        assert refused(lines).startswith(f"entry {place}:")


def test_every_swap_of_neighbours_and_others_is_found_and_named():
    for place in range(COUNT):
        for other in {place + 1, (place * 7 + 50) % COUNT} - {place}:
            lines = LINES.copy()
            lines[place], lines[other] = lines[other], lines[place]
            text = refused(lines)
            first = min(place, other)
            # Swapping the last entry with the checkpoint leaves an entry behind the end.
            assert text.startswith(f"entry {first}:") or "follows the checkpoint" in text


def test_every_repetition_is_found_and_named():
    for place in range(COUNT):
        lines = [*LINES[: place + 1], *LINES[place:]]
        assert refused(lines).startswith(f"entry {place + 1}:")


def test_every_truncation_is_found():
    for stop in range(COUNT + 1):
        assert refused(LINES[:stop]) == f"entry {stop}: the export is cut off before its checkpoint"
        assert refused([*LINES[:stop], LINES[-1]] if stop < COUNT else LINES[:-1])
    for stop in range(0, len(SHORT_TEXT) - 1, 5):
        assert refused(SHORT_TEXT[:stop].splitlines(keepends=True))


def test_a_ledger_cut_back_with_an_old_checkpoint_still_verifies_as_that_old_ledger():
    """What an export alone cannot show: that is why agents remember the newest checkpoint."""
    older = written(export(150))
    assert audit.verify_export(older, public_key=PUBLIC).entries == 150


def test_entry_and_leaf_changed_together():
    document = copy.deepcopy(DOCUMENTS[17])
    document["entry"]["actor"] = "admin"
    document["leaf"] = audit.entry_leaf(document["entry"]).hex()
    lines = [*LINES[:17], json.dumps(document), *LINES[18:]]
    assert "do not give the signed root" in refused(lines)


def test_a_checkpoint_of_another_size():
    assert refused(written(export(20, size=21))).startswith("entry 20:")
    assert refused(written(export(20, size=19))).startswith("entry 19:")


def test_a_ledger_signed_anew_needs_a_pinned_key_to_be_found():
    forged = written(export(20, key=OTHER))
    report = audit.verify_export(forged)
    assert not report.pinned
    assert "not by" in refused(forged, PUBLIC)


def test_the_pinned_key_is_the_one_that_must_have_signed():
    documents = export(20, key=OTHER)
    documents[-1]["public_key"] = PUBLIC
    assert "no signature" in refused(written(documents), PUBLIC)


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"checkpoint": DOCUMENTS[-1]["checkpoint"]},
        {"public_key": PUBLIC},
        {"checkpoint": None, "public_key": PUBLIC},
        {"checkpoint": DOCUMENTS[-1]["checkpoint"], "public_key": 5},
        {"checkpoint": "", "public_key": PUBLIC},
        {"checkpoint": DOCUMENTS[-1]["checkpoint"], "public_key": ""},
        {**DOCUMENTS[-1], "more": 1},
        {"checkpoint": signed(COUNT), "public_key": PUBLIC},
        {"checkpoint": DOCUMENTS[-1]["checkpoint"] + "\ud800", "public_key": PUBLIC},
    ],
)
def test_a_bad_last_line(head):
    refused([*LINES[:-1], json.dumps(head)])


def test_nothing_may_follow_the_checkpoint():
    for tail in (LINES[-1], LINES[0], "\n", "x"):
        assert "follows the checkpoint" in refused([*LINES, tail])


@pytest.mark.parametrize(
    "line",
    [
        "",
        "\n",
        "null",
        "7",
        "[]",
        "{",
        '{"seq":0}{}',
        '\ufeff{"seq":0}',
        "[" * 5000,
        '{"seq":' * 5000,
        "9" * 5000,
        '{"seq":0,"seq":0,"leaf":"","entry":{}}',
    ],
)
def test_lines_that_are_none(line):
    for place in (0, 7):
        assert refused([*LINES[:place], line, *LINES[place:]]).startswith(f"entry {place}:")


def test_a_key_given_twice_is_refused_even_if_one_reading_is_right():
    for place, text in ((3, '"actor": "'), (9, '"seq": 9'), (11, '"ok": true')):
        line = LINES[place]
        assert line.count(text) >= 1
        doubled = line.replace(text, f"{text.split(':')[0]}: 0, {text}", 1)
        lines = [*LINES[:place], doubled, *LINES[place + 1 :]]
        assert refused(lines).startswith(f"entry {place}:")


@FAST
@given(st.integers(0, len(SHORT_TEXT) - 1), st.characters(codec="utf-8"), st.booleans())
def test_any_changed_character_is_found_unless_it_says_the_same(place, character, insert):
    check_changed(SHORT_TEXT[:place] + character + SHORT_TEXT[place + (not insert) :])


@FAST
@given(st.data(), st.characters(codec="utf-8"), st.booleans())
def test_any_changed_character_of_an_export_line_is_found(data, character, insert):
    text = "".join(line_of(document) for document in export(5))
    place = data.draw(st.integers(0, len(text) - 1))
    check_changed(text[:place] + character + text[place + (not insert) :])


def check_changed(changed: str) -> None:
    lines = changed.split("\n")[:-1]
    try:
        audit.verify_export(lines, public_key=PUBLIC)
    except LedgerError:
        return
    assert [json.loads(line) for line in lines] == [json.loads(line) for line in SHORT]
