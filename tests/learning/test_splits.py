"""Splits: who gets which rows, what differs between clients, and manifests that keep it."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

from fedselect.cli import build
from fedselect.errors import FedSelectError
from fedselect.policies import Training, preset_run
from fedselect.simulate import simulate
from fedselect.tasks import EXAMPLES, client_tasks, example_clients
from fedselect.tasks.changes import Change, worlds
from fedselect.tasks.datasets import Dataset, save
from fedselect.tasks.federations import FEDERATIONS, SplitTask, dealt, split_tasks
from fedselect.tasks.sources import open_dataset
from fedselect.tasks.splits import ClientRows, Split, deal, read_manifest


def dataset(rows=1200, classes=6, *, groups=None, held_out=None, name="made"):
    rng = np.random.default_rng(5)
    labels = rng.permutation(np.arange(rows) % classes)
    return Dataset(
        name,
        rng.normal(size=(rows, 4, 4)).astype(np.float32),
        labels,
        groups=groups,
        held_out=held_out,
    )


MADE = {
    "classes": Split(kind="classes", clients=6, classes=2, train=5, test=7),
    "even": Split(kind="classes", clients=5, classes=6, train=4, test=3),
    "dirichlet": Split(kind="dirichlet", clients=8, alpha=0.3, train=30, test=20),
    "shards": Split(kind="shards", clients=6, shards=2, train=30, test=20),
}


def label_counts(found, rows):
    return np.bincount(found.labels[list(rows)], minlength=found.classes)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("own_test_part", [False, True])
def test_a_made_split_gives_what_it_says_and_no_row_twice(name, own_test_part):
    held_out = np.arange(1200) % 3 == 0 if own_test_part else None
    found, split = dataset(held_out=held_out), MADE[name]
    manifest = deal(found, split, seed=3)
    assert len(manifest.clients) == split.clients
    every = [row for c in manifest.clients.values() for row in (*c.train, *c.test)]
    assert len(set(every)) == len(every)
    times = split.classes if split.kind == "classes" else 1
    for each in manifest.clients.values():
        assert (len(each.train), len(each.test)) == (times * split.train, times * split.test)
        if own_test_part:
            assert not held_out[list(each.train)].any()
            assert held_out[list(each.test)].all()
        train, test = (label_counts(found, rows) for rows in (each.train, each.test))
        assert set(np.flatnonzero(test)) <= set(np.flatnonzero(train)) or split.kind == "dirichlet"
        if split.kind == "shards":
            assert np.count_nonzero(train) <= 2 * split.shards
    assert deal(found, split, seed=3) == manifest
    assert deal(found, split, seed=4).clients != manifest.clients


def test_a_small_alpha_skews_more():
    def skew(alpha):
        split = Split(kind="dirichlet", clients=10, alpha=alpha, train=40, test=10)
        clients = deal(dataset(rows=3000), split, seed=1).clients.values()
        shares = [label_counts(dataset(rows=3000), c.train).max() / len(c.train) for c in clients]
        return np.mean(shares)

    assert skew(0.1) > 0.5 > skew(100.0) > 1 / 6


def test_a_split_by_group_keeps_to_the_groups():
    found = dataset(groups=np.repeat([7, 2, 30], [500, 400, 300]))
    split = Split(kind="group", per="class", train=3, test=5)
    manifest = deal(found, split, seed=0, noun="site")
    assert list(manifest.clients) == ["site-02", "site-07", "site-30"]
    for name, each in manifest.clients.items():
        assert set(found.groups[list(each.train + each.test)]) == {int(name[5:])}
        assert label_counts(found, each.train).tolist() == [3] * 6
        assert label_counts(found, each.test).tolist() == [5] * 6
    largest = Split(kind="group", clients=2, train=40, test=60)
    assert list(deal(found, largest, seed=0).clients) == ["client-02", "client-07"]


def test_a_share_is_drawn_of_each_block_that_is_not_held_out():
    blocks = np.repeat(np.arange(12), 100)
    found = Dataset(
        "blocks",
        np.arange(1200, dtype=np.float32)[:, None],
        np.arange(1200) % 4,
        groups=blocks // 4,
        held_out=np.arange(1200) % 100 >= 60,
        blocks=blocks,
    )
    manifest = deal(found, Split(kind="group", share=0.25), seed=9)
    for number, each in enumerate(manifest.clients.values()):
        train, test = np.array(each.train), np.array(each.test)
        assert np.bincount(blocks[train], minlength=12).tolist() == [
            15 * (block // 4 == number) for block in range(12)
        ]
        assert np.array_equal(test, np.flatnonzero((blocks // 4 == number) & found.held_out))


@pytest.mark.parametrize(
    ("split", "text"),
    [
        ({"kind": "classes", "clients": 6, "classes": 6, "train": 50, "test": 7}, "need 300 exam"),
        ({"kind": "group", "train": 5, "test": 5}, "does not say whose"),
        ({"kind": "group", "share": 0.5}, "does not say whose"),
    ],
)
def test_a_split_that_the_data_do_not_allow_is_refused(split, text):
    with pytest.raises(FedSelectError, match=text) as caught:
        deal(dataset(), Split(**split), seed=0)
    assert caught.value.code == "split_invalid"


@pytest.mark.parametrize(
    "split",
    [
        {"kind": "classes", "clients": 3, "train": 1, "test": 1},
        {"kind": "dirichlet", "clients": 3, "train": 1, "test": 1},
        {"kind": "shards", "train": 1, "test": 1, "shards": 2},
        {"kind": "classes", "clients": 3, "classes": 2, "train": 1},
        {"kind": "classes", "clients": 3, "classes": 2, "share": 0.5},
        {"kind": "groups"},
        {"kind": "group", "train": 1, "test": 1, "world": "upside down"},
    ],
)
def test_settings_that_say_too_little_are_refused(split):
    with pytest.raises(ValidationError):
        Split(**split)


# --- what differs between clients ---------------------------------------------------------------


def test_worlds_are_dealt_evenly_and_do_what_they_say():
    images = np.random.default_rng(0).random((3, 4, 4)).astype(np.float32)
    labels = np.array([0, 1, 5])

    def kinds(world, clients):
        return worlds(world, clients, 6, seed=1)

    assert sorted(c.quarter_turns for c in kinds("rotation", 8)) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(c.contrast for c in kinds("contrast", 6)) == [0.25, 0.25, 0.5, 0.5, 1, 1]
    assert sorted(c.inverted for c in kinds("inversion", 4)) == [False, False, True, True]
    mixed = kinds("mixed", 9)
    assert sum(c == Change() for c in mixed) == 3
    assert sum(c.labels is not None for c in mixed) == sum(c.inverted for c in mixed) == 3
    assert kinds("same", 2) == [Change(), Change()]

    turned, _ = Change(quarter_turns=1).apply((images, labels))
    np.testing.assert_array_equal(turned[0], np.rot90(images[0]))
    flat, _ = Change(contrast=0.5).apply((images, labels))
    np.testing.assert_allclose(flat, 0.25 + images / 2, rtol=1e-6)
    negative, same = Change(inverted=True).apply((images, labels))
    np.testing.assert_array_equal(negative, 1 - images)
    assert same.tolist() == [0, 1, 5]


def test_every_client_confuses_four_labels_of_its_own():
    changes = worlds("labels", 12, 10, seed=2)
    for change in changes:
        labels = np.array(change.labels)
        moved = np.flatnonzero(labels != np.arange(10))
        assert len(moved) == 4
        orbit = [int(moved[0])]
        while labels[orbit[-1]] != orbit[0]:
            orbit.append(int(labels[orbit[-1]]))
        assert sorted(orbit) == moved.tolist(), "one cycle"
    assert len({change.labels for change in changes}) > 6
    with pytest.raises(FedSelectError, match="4 labels"):
        worlds("labels", 2, 3, seed=0)


def test_only_images_are_turned():
    rows = Dataset("rows", np.zeros((40, 3), np.float32), np.arange(40) % 4)
    split = Split(kind="classes", clients=4, classes=4, train=1, test=1, world="rotation")
    with pytest.raises(FedSelectError, match="no images that could be turned"):
        deal(rows, split, seed=0)


# --- manifests ------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    found = dataset()
    path = tmp_path / "splits" / "made.json"
    deal(found, MADE["classes"].model_copy(update={"world": "mixed"}), seed=3).save(path)
    return found, path


def test_a_manifest_comes_back_as_it_was(saved):
    found, path = saved
    again = read_manifest(path)
    again.verify(found)
    assert again == deal(found, again.split, seed=again.seed)
    assert len(path.read_text().splitlines()) == len(again.clients) + 8


def edited(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


TAMPERED = {
    "another data set": (lambda d: d.update(digest="0" * 64), "digest"),
    "a row twice": (
        lambda d: d["clients"]["client-00"]["train"].append(d["clients"]["client-01"]["test"][0]),
        "deals a row twice",
    ),
    "a row too far": (lambda d: d["clients"]["client-00"]["train"].append(1200), "has not"),
    "a negative row": (lambda d: d["clients"]["client-00"]["train"].append(-1), "has not"),
    "labels that are none": (
        lambda d: d["clients"]["client-00"].update(change={"labels": [0, 0, 1, 2, 3, 4]}),
        "no permutation",
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_manifest_that_does_not_fit_its_data_is_refused(saved, what):
    found, path = saved
    change, text = TAMPERED[what]
    manifest = read_manifest(edited(path, change))
    with pytest.raises(FedSelectError, match=text) as caught:
        manifest.verify(found)
    assert caught.value.code == "split_invalid"


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format="fedselect-split/9"),
        lambda d: d.update(clients={}),
        lambda d: d.update(more=1),
        lambda d: d["clients"]["client-00"].update(train=["1"]),
        lambda d: d["clients"]["client-00"].update(test=[]),
        lambda d: d.pop("seed"),
    ],
)
def test_what_is_no_manifest_is_refused(saved, change):
    with pytest.raises(FedSelectError, match="no split manifest"):
        read_manifest(edited(saved[1], change))


def test_other_data_under_the_same_name_do_not_run(tmp_path):
    path = tmp_path / "digits.json"
    deal(open_dataset("digits"), MADE["classes"], seed=0).save(path)
    tasks = client_tasks(f"split:{path}")
    assert list(tasks) == [f"client-{n:02d}" for n in range(6)]
    edited(path, lambda d: d.update(digest="f" * 64))
    from fedselect.tasks import federations

    federations._read.cache_clear()
    with pytest.raises(FedSelectError, match="the data here have"):
        client_tasks(f"split:{path}")


# --- federations ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-dirichlet", "digits-mixed"])
def test_a_named_federation_runs(name):
    tasks = client_tasks(name, seed=1)
    assert list(tasks) == list(dealt(name, 1).clients)
    result = simulate(tasks, preset_run("fedselect", rounds=4, training=Training(steps=2)))
    assert set(result.scores) == set(tasks)
    assert all(score["post"].total >= 60 for score in result.scores.values())


def test_clients_see_their_own_world():
    manifest = dealt("digits-mixed", 1)
    found = open_dataset("digits")
    tasks = split_tasks(manifest, seed=0)
    for name, rows in manifest.clients.items():
        inputs, labels = found.examples(np.array(rows.train))
        mine, called = tasks[name]._train
        same = torch.equal(mine, torch.tensor(inputs))
        assert same == (not rows.change.inverted)
        assert called.tolist() == [
            rows.change.labels[c] if rows.change.labels else c for c in labels
        ]


def test_images_reach_the_network_from_minus_one_to_one_and_a_negative_is_minus_x():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4), dtype=np.uint8)
    images[0, 0, :2] = 0, 255
    pictures = Dataset("pictures", images, np.array([0, 1]))
    plain, inverted = (
        SplitTask(pictures, ClientRows(train=(0,), test=(1,), change=change), seed=0)
        for change in (Change(), Change(inverted=True))
    )
    inputs, negatives = plain._train[0], inverted._train[0]
    assert inputs[0, 0, :2].tolist() == [-1, 1]
    torch.testing.assert_close(negatives, -inputs)
    torch.testing.assert_close(plain._test[0][0], torch.tensor(images[1] / 127.5 - 1).float())


def test_every_federation_is_an_example_of_as_many_clients():
    assert set(EXAMPLES) == {*FEDERATIONS, "digits", "fashion-mnist"}
    for name, each in FEDERATIONS.items():
        clients = example_clients(name)
        assert each.split.clients in {None, len(clients)}, name
        assert all(client.startswith(f"{each.noun}-") for client in clients)


def test_there_is_no_such_client_or_federation():
    from fedselect.tasks.federations import client_task

    with pytest.raises(FedSelectError, match="no client site-10"):
        client_task("digits-dirichlet", 10)
    with pytest.raises(FedSelectError, match="no federation"):
        client_task("digits-at-random", 0)


# --- the command ------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    def call(*words):
        return CliRunner().invoke(build("data"), ["data", *map(str, words)])

    return call


def test_splits_are_made_checked_and_run_by_command(run, tmp_path):
    out = tmp_path / "skew.json"
    settings = ["kind=dirichlet", "clients=4", "alpha=0.5", "train=20", "test=30", 'world="mixed"']
    words = [word for setting in settings for word in ("--setting", setting)]
    said = run("split", "digits", "--out", out, "--seed", 5, *words)
    assert said.exit_code == 0, said
    assert f"4 clients. Run it: fedselect simulate --task split:{out}" in said.stdout
    said = run("check", out)
    assert "digits: 4 clients, 200 examples, none dealt twice" in said.stdout
    result = CliRunner().invoke(
        build("simulate"),
        ["simulate", "--task", f"split:{out}", "--rounds", "4", "--steps", "2", "--json"],
    )
    assert result.exit_code == 0, result
    document = json.loads(result.stdout)
    assert list(document["clients"]) == [f"client-{n:02d}" for n in range(4)]


def test_the_split_of_a_federation_is_kept_by_command(run, tmp_path):
    out = tmp_path / "mixed.json"
    assert run("split", "digits-mixed", "--seed", 4, "--out", out).exit_code == 0
    assert read_manifest(out) == dealt("digits-mixed", 4)
    mine, theirs = client_tasks(f"split:{out}"), client_tasks("digits-mixed", seed=4)
    assert all(torch.equal(mine[name]._train[0], theirs[name]._train[0]) for name in theirs)


def test_pictures_of_ones_own_become_a_data_set(run, tmp_path):
    from PIL import Image

    for client in ("a", "b"):
        for label in ("x", "y"):
            place = tmp_path / "pictures" / client / label
            place.mkdir(parents=True)
            for n in range(6):
                Image.new("RGB", (8, 8), (40 * n, 200 if label == "x" else 0, 0)).save(
                    place / f"{n}.png"
                )
    words = ["--from", tmp_path / "pictures", "--images", "--side", 16, "--cache", tmp_path / "c"]
    assert run("get", "wards", *words).exit_code == 0
    out = tmp_path / "wards.json"
    settings = ["--setting", "kind=group", "--setting", "train=8", "--setting", "test=4"]
    said = run("split", "wards", "--out", out, *settings, "--cache", tmp_path / "c")
    assert said.exit_code == 0, said
    tasks = client_tasks(f"split:{out}", cache=tmp_path / "c")
    result = simulate(tasks, preset_run("fedavg", rounds=2, training=Training(steps=3)))
    assert result.space.dim == sum(p.numel() for p in tasks["client-00"].build_model().parameters())
    assert run("get", "wards").exit_code != 0
    assert run("get", "digits", "--images", "--from", tmp_path).exit_code != 0


def test_the_list_says_what_is_here(run, tmp_path):
    save(dataset(name="vowel"), tmp_path)
    said = run("list", "--cache", tmp_path)
    assert said.exit_code == 0, said
    for text in ("digits", "cifar10", "1,797 examples", "1,200 examples"):
        assert text in said.stdout
