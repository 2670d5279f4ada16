"""YAML as it is taken: words of YAML 1.2, nothing that could run or swell, lines of all values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedselect.yamlfile import DEEPEST, MOST, MisspeltError, read


def refused(text: str) -> tuple[int, str]:
    with pytest.raises(MisspeltError) as caught:
        read(text)
    return caught.value.line, caught.value.problem


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# nothing\n", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("false", False),
        ("no", "no"),
        ("on", "on"),
        ("True", "True"),
        ("010", 10),
        ("-3", -3),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-11-25", "2026-11-25"),
        ("1e-05", 1e-05),
        (".5", 0.5),
        (".inf", ".inf"),
        ("1e999", float("inf")),
        ("9" * 40, float("9" * 40)),
        ("'5'", "5"),
        ('"a\\u00e9"', "aé"),
        ("!!str 5", "5"),
        ("[1, [a, 2.5]]", [1, ["a", 2.5]]),
        ("a: {b: [c]}\nd:\n  - e\n  -\n", {"a": {"b": ["c"]}, "d": ["e", None]}),
    ],
)
def test_what_a_text_says(text, value):
    found = read(text).data
    assert found == value
    assert type(found) is type(value)


def test_every_value_has_its_line():
    found = read("# head\na: 1\nb:\n  c: x\n  d:\n    - y\n    - {e: z}\n")
    lines = {(): 2, ("a",): 2, ("b",): 3, ("b", "c"): 4, ("b", "d", 1): 7, ("b", "d", 1, "e"): 7}
    assert {path: found.line(path) for path in lines} == lines
    assert found.line(("b", "missing")) == 3
    assert found.line(("nowhere", 3)) == 2


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("a: 1\nb: [1\nc: 2\n", 3, "expected"),
        ("a: 1\na: 2\n", 2, "twice"),
        ("a: &x [1]\nb: *x\n", 2, "aliases"),
        ("a: 1\n---\nb: 2\n", 2, "document"),
        ("a: !!python/object/apply:os.system [x]\n", 1, "not taken"),
        ("a: !!int x\n", 1, "not taken"),
        ("a: !!bool maybe\n", 1, "not taken"),
        ("a: 1\n? [b]\n: 2\n", 2, "cannot name"),
        ("1: a\n", 1, "cannot name"),
        ("a: 1\n<<: {b: 2}\nc: \t\n\tx", 3, ""),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), 1, "deep"),
        ("#" * (MOST + 1), 1, "characters"),
        ("a: \x07", 1, ""),
    ],
)
def test_what_is_not_taken(text, line, word):
    found, problem = refused(text)
    assert found in {line, line + 1}, problem
    assert word in problem


def test_a_bomb_of_aliases_is_refused_at_the_first():
    layers = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12))
    assert refused(f"l0: &l0 [x]\n{layers}\n") == (2, refused(f"l0: &l0 [x]\n{layers}")[1])


@given(st.text(alphabet=st.sampled_from("ab:-[]{}!&*?,#|>'\"%@\n\t 01.~<é\x00"), max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        found = read(text)
    except MisspeltError as error:
        least = error.line
    else:
        least = min(found.lines.values(), default=1)
    assert least >= 1
