"""Failpoints: dying at the n-th visit, orders to running processes, otherwise nothing at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app import failpoints

ROOT = Path(__file__).parents[2]
SCRIPT = """
from app import failpoints

class Store:
    def put(self, key, data): print("put", key)
    def keys(self, prefix): yield from ("a", "b")
    def sign_put(self, key): print("sign", key)

store = failpoints.bracket(Store(), "store")
for number in range(3):
    store.put("staging/x", b"")
    store.sign_put("staging/x")
    print(list(store.keys("partials/")))
    failpoints.reach("accept.before_commit")
    failpoints.reach("accept.after_commit")
"""


def run(order: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-c", SCRIPT]
    env = {**os.environ, "FAILPOINT": order}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout.split("\n")[:-1]


ONCE = ["put staging/x", "sign staging/x", "['a', 'b']"]


@pytest.mark.parametrize(
    ("order", "lines"),
    [
        ("accept.after_commit:2", 2 * ONCE),
        ("store.put.staging.before:1", []),
        ("store.put.staging.after:1", ONCE[:1]),
        ("store.keys.partials.after:3", [*ONCE, *ONCE, *ONCE[:2]]),
    ],
)
def test_a_process_dies_at_its_nth_visit(order, lines):
    # What a killed process has printed and not flushed is lost with it.
    status, printed = run(order)
    assert status == failpoints.DIED
    assert printed in (lines, [])


def test_an_order_for_a_place_that_is_not_reached_does_nothing():
    assert run("accept.before_commit:4") == (0, 3 * ONCE)


def test_a_test_steers_running_processes_through_a_folder(tmp_path):
    (tmp_path / "armed").write_text("accept.after_commit:4\nstore.put.staging.before:9")
    assert run(str(tmp_path))[0] == 0
    assert run(str(tmp_path))[0] == failpoints.DIED  # its first visit is the fourth of all
    assert (tmp_path / "armed").read_text() == "store.put.staging.before:5"
    assert run(str(tmp_path))[0] == 0
    visits = (tmp_path / "visits").read_text().split()
    assert visits[:2] == ["store.put.staging.before", "store.put.staging.after"]
    assert visits.count("accept.after_commit") == 3 + 1 + 3
    assert not [place for place in visits if "sign" in place]


def test_unarmed_nothing_is_wrapped():
    assert failpoints.ORDER == ""
    port = object()
    assert failpoints.bracket(port, "store") is port
