"""Canonical JSON, leaf hashes and signed checkpoints; other people's code agrees."""

from __future__ import annotations

import base64
import hashlib
import json

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_samples import KEY, ORIGIN, OTHER, PUBLIC, ROOT, signed

from fedselect import audit
from fedselect.errors import LedgerError

FAST = settings(max_examples=100, deadline=None, derandomize=True)

# --- canonical JSON ----------------------------------------------------------------------------

WHOLE = st.integers(-audit.MAX_INTEGER, audit.MAX_INTEGER)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | WHOLE | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=12,
)


@FAST
@given(VALUES)
def test_canonical_json_is_rfc_8785(value):
    assert audit.canonical_json(value) == rfc8785.dumps(value)
    assert json.loads(audit.canonical_json(value)) == value


@FAST
@given(st.dictionaries(st.text("aé\ue000\uffff\U00010000\U0010ffff", max_size=3), WHOLE))
def test_keys_are_sorted_by_utf_16_code_units(value):
    assert audit.canonical_json(value) == rfc8785.dumps(value)


def test_the_sorting_example_of_rfc_8785():
    names = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\x80": 6, "\u00f6": 7}
    found = json.loads(audit.canonical_json(names))
    assert list(found.values()) == [2, 4, 6, 7, 1, 5, 3]


@pytest.mark.parametrize(
    "value",
    [
        1.0,
        float("nan"),
        2**53,
        -(2**53),
        pytest.param(10**5000, id="huge"),
        "\ud800",
        {"\udfff": 1},
        {1: "a"},
        {None: "a"},
        {True: "a"},
        b"bytes",
        {"set"},
        ("tuple",),
        object(),
        {"deep": [{"er": 0.5}]},
    ],
)
def test_what_has_no_canonical_form(value):
    with pytest.raises(LedgerError):
        audit.canonical_json(value)
    with pytest.raises(LedgerError):
        audit.entry_leaf({"body": value})


def test_nesting_is_bounded():
    def nested(depth: int, inner: object) -> object:
        return nested(depth - 1, [inner]) if depth else inner

    assert audit.canonical_json(nested(32, "x"))
    for depth in (33, 500, 900):
        with pytest.raises(LedgerError, match="nest deeper"):
            audit.canonical_json(nested(depth, "x"))


def test_a_leaf_hash_is_domain_separated_and_ignores_order():
    entry = {"seq": 0, "actor": "client:ward-7"}
    expected = hashlib.sha256(b'\x00{"actor":"client:ward-7","seq":0}').digest()
    assert audit.entry_leaf(entry) == expected
    assert audit.entry_leaf(dict(reversed(entry.items()))) == expected
    assert audit.entry_leaf(entry | {"seq": 1}) != expected


# --- checkpoints -------------------------------------------------------------------------------


def test_a_checkpoint_comes_back():
    text = signed()
    assert audit.verify_checkpoint(text, PUBLIC) == audit.Checkpoint(ORIGIN, 5, ROOT)
    lines = text.split("\n")
    assert lines[:2] == [ORIGIN, "5"]
    assert base64.b64decode(lines[2]) == ROOT
    assert lines[3] == ""
    assert lines[4].startswith(f"— {ORIGIN} ")
    assert lines[5:] == [""]


def test_the_verifier_key_form():
    name, hashed, encoded = PUBLIC.split("+", 2)
    raw = b"\x01" + KEY.public_key().public_bytes_raw()
    assert name == ORIGIN
    assert base64.b64decode(encoded) == raw
    assert hashed == hashlib.sha256(f"{ORIGIN}\n".encode() + raw).hexdigest()[:8]
    assert audit.read_verifier_key(PUBLIC)[1].public_bytes_raw() == raw[1:]


@pytest.mark.parametrize(
    "key",
    [
        "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8",
        "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
    ],
)
def test_keys_of_other_logs_are_read(key):
    name, public = audit.read_verifier_key(key)
    assert audit.verifier_key(public, name) == key


def test_a_note_signed_by_another_implementation():
    key = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    note = (
        "If you think cryptography is the answer to your problem,\n"
        "then you don't know what your problem is.\n\n"
        "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdng"
        "otpRZb6KE6RyyBwJnAM=\n"
    )
    # The signature is right, so what is refused is that this text is no checkpoint.
    with pytest.raises(LedgerError, match="origin, a size and a root"):
        audit.verify_checkpoint(note, key)
    with pytest.raises(LedgerError, match="does not fit"):
        audit.verify_checkpoint(note.replace("answer", "Answer"), key)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "name",
        "name+00000000+",
        PUBLIC[:-1],
        PUBLIC + "A",
        PUBLIC.replace("ledger", "Ledger"),
        PUBLIC.replace("+", "+0", 1),
        "x+" + PUBLIC.split("+", 1)[1],
        "a b+" + PUBLIC.split("+", 1)[1],
        f"n+00000000+{base64.b64encode(bytes([2]) * 33).decode()}",
        f"n+00000000+{base64.b64encode(bytes([1]) * 32).decode()}",
        "n+00000000+é",
    ],
)
def test_what_is_no_verifier_key(key):
    with pytest.raises(LedgerError):
        audit.verify_checkpoint(signed(), key)


def test_witnesses_may_sign_too_but_do_not_count():
    mine, witness = signed(), signed(key=OTHER, name="witness.example")
    body, _, line = witness.rpartition("\n\n")
    cosigned = mine + line
    assert audit.verify_checkpoint(cosigned, PUBLIC).size == 5
    with pytest.raises(LedgerError, match="no signature"):
        audit.verify_checkpoint(witness, PUBLIC)
    assert body == mine.rpartition("\n\n")[0]


def test_a_known_key_with_a_wrong_signature_spoils_the_note():
    forged = signed(6).rpartition("\n\n")[2]
    with pytest.raises(LedgerError, match="does not fit"):
        audit.verify_checkpoint(signed() + forged, PUBLIC)


def resigned(body: str) -> str:
    return audit.sign_checkpoint(body, KEY, ORIGIN)


ROOT64 = base64.b64encode(ROOT).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        signed()[:-1],
        signed().replace("\n\n", "\n"),
        signed().replace("\n5\n", "\n6\n"),
        signed().replace(ORIGIN, "elsewhere", 1),
        signed() + "\n",
        signed() + "no signature line\n",
        signed() + "— two words too many\n",
        signed() + "— name !!!\n",
        signed().replace("—", "-"),
        signed() + "— w AAAA\n" * 100,
        resigned(f"{ORIGIN}\n5\n"),
        resigned(f"{ORIGIN}\n05\n{ROOT64}\n"),
        resigned(f"{ORIGIN}\n+5\n{ROOT64}\n"),
        resigned(f"{ORIGIN}\n٥\n{ROOT64}\n"),
        resigned(f"{ORIGIN}\n{'9' * 30}\n{ROOT64}\n"),
        resigned(f"{ORIGIN}\n5\n{ROOT64[:-4]}\n"),
        resigned(f"{ORIGIN}\n5\n{ROOT64}\n\nextension\n"),
        resigned(f"\n5\n{ROOT64}\n"),
        resigned(f"tab\there\n5\n{ROOT64}\n"),
    ],
)
def test_what_is_no_checkpoint(text):
    with pytest.raises(LedgerError):
        audit.verify_checkpoint(text, PUBLIC)


def test_signed_extension_lines_are_ignored():
    text = resigned(f"{ORIGIN}\n5\n{ROOT64}\nextension\n")
    assert audit.verify_checkpoint(text, PUBLIC) == audit.Checkpoint(ORIGIN, 5, ROOT)


def test_every_character_of_a_checkpoint_counts():
    text = signed()
    for place in range(len(text)):
        for other in ("", "A", "B", "\n", "é", "\ud800"):
            changed = text[:place] + other + text[place + 1 :]
            if changed != text:
                with pytest.raises(LedgerError):
                    audit.verify_checkpoint(changed, PUBLIC)


@pytest.mark.parametrize(
    ("origin", "size", "root"),
    [("", 1, ROOT), ("a\nb", 1, ROOT), ("a", -1, ROOT), ("a", 1, ROOT[:31]), ("a", 1, b"")],
)
def test_bodies_that_cannot_be(origin, size, root):
    with pytest.raises(LedgerError):
        audit.checkpoint_body(origin, size, root)


@pytest.mark.parametrize("name", ["", "two words", "a+b", "a\nb", "a\u2003b", "a\u00a0b"])
def test_names_that_cannot_be(name):
    with pytest.raises(LedgerError):
        audit.sign_checkpoint(audit.checkpoint_body(ORIGIN, 5, ROOT), KEY, name)
