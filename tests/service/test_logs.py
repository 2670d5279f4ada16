"""Lines of the log: their ids, their format, and that no secret leaves in them."""

from __future__ import annotations

import json
import logging
import threading

import pytest

from app import logs


def record(message, *args, **extra):
    found = logging.LogRecord("app.test", logging.INFO, __file__, 1, message, args, None)
    vars(found).update(extra)
    return found


def test_ids_come_and_go():
    assert logs.current() == {}
    logs.note(run=1)  # nothing is under way
    with logs.about(request="r1", run=None):
        logs.note(run="u", other="x")
        with logs.about(job="j"):
            assert logs.current() == {"request": "r1", "job": "j", "run": "u"}
            logs.note(client="c")
        assert logs.current() == {"request": "r1", "run": "u"}
    assert logs.current() == {}


def test_threads_do_not_mix():
    seen = []
    with logs.about(request="r1"):
        thread = threading.Thread(target=lambda: seen.append(logs.current()))
        thread.start()
        thread.join()
    assert seen == [{}]


def test_json_lines_are_one_object_each():
    with logs.about(request="r1"):
        error = ValueError("two\nlines")
        broken = record("it %s", "broke", exc_info=(type(error), error, None))
        broken.facts = {"status": 500}
        line = logs.JsonLines().format(broken)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["message"], found["request"], found["status"]) == ("it broke", "r1", 500)
    assert found["error"].endswith("ValueError: two\nlines")
    assert found["at"].endswith("+00:00")


def test_text_lines_carry_the_ids():
    with logs.about(job="j1"):
        assert logs.Lines().format(record("done")).endswith("app.test done [job=j1]")


KEY = f"fsk_{'01234567' * 2}_{'89abcdef' * 8}_76543210"  # the same in all processes of a run


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"key {KEY}", KEY[21:]),
        (f"token {KEY.replace('fsk', 'fse')}", KEY[21:]),
        ("PUT /b/k?X-Amz-Signature=0123456789abcdef&x=1", "0123456789abcdef"),
        ("GET /b?X-Amz-Credential=AKIA%2F20260101", "AKIA"),
        ("postgresql+psycopg://user:pass@word@host/db", "pass"),
        ("Authorization: Bearer abcdefghijklmnopqrstuvwx", "abcdefghijklmnopqrstuvwx"),
    ],
)
def test_secrets_are_cut_out(text, secret):
    for formatter in (logs.Lines(), logs.JsonLines()):
        line = formatter.format(record("%s", text))
        assert secret not in line
        assert logs.REMOVED in line


def test_the_public_part_of_a_key_stays():
    assert logs.censor(KEY) == KEY[:21] + logs.REMOVED


def test_one_handler_however_often():
    root = logging.getLogger()
    before = list(root.handlers), root.level
    try:
        logs.configure("json", "info")
        logs.configure("text", "INFO")
        assert [h.get_name() for h in root.handlers].count("fedselect") == 1
        assert root.level == logging.INFO
    finally:
        root.handlers[:], level = before
        root.setLevel(level)
