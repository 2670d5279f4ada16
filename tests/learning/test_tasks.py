"""The example tasks: their splits, their weights, and loading a task by name."""

import gzip
import sys

import numpy as np
import pytest
import torch

from fedselect import Role, Task
from fedselect.errors import FedSelectError
from fedselect.tasks import client_tasks, load_task, task_arguments
from fedselect.tasks.arrays import LabelSkew
from fedselect.tasks.digits import DigitsTask
from fedselect.tasks.fashion_mnist import FashionMnistTask, read_idx
from fedselect.tasks.watch import WatchTask
from fedselect.training import TorchLearner


@pytest.fixture(scope="session")
def watch_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("watch")


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(head + array.astype(np.uint8).tobytes(), compresslevel=1)


@pytest.fixture(scope="session")
def fashion(tmp_path_factory):
    """A folder in the form of Debian's package, with small random images."""
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    for part, per_class in (("train", 60), ("t10k", 260)):
        labels = rng.permutation(np.repeat(np.arange(10), per_class))
        images = rng.integers(0, 256, (len(labels), 28, 28))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return folder


def parts(task):
    train_x, train_y = task._train
    test_x, test_y = task._test
    return train_x, train_y, test_x, test_y


def rows(tensor):
    return {row.numpy().tobytes() for row in tensor}


# --- the splits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("clients", "per_client"), [(10, 2), (10, 5), (20, 5), (7, 3), (3, 10)])
def test_label_skew_deals_distinct_classes_evenly_and_no_row_twice(clients, per_client):
    split = LabelSkew(clients, per_client, seed=4)
    dealt = split.labels()
    assert all(len(set(mine.tolist())) == per_client for mine in dealt)
    used = np.bincount(np.concatenate(dealt), minlength=10)
    assert used.max() - used.min() <= 1

    labels = np.arange(2000) % 10
    found = split.rows(labels, 6)
    flat = np.concatenate([chosen.reshape(-1) for chosen in found])
    assert len(set(flat.tolist())) == flat.size == clients * per_client * 6
    for mine, chosen in zip(dealt, found, strict=True):
        np.testing.assert_array_equal(labels[chosen], np.repeat(mine[:, None], 6, axis=1))
    again = LabelSkew(clients, per_client, seed=4).rows(labels, 6)
    np.testing.assert_array_equal(np.stack(found), np.stack(again))


def test_a_split_that_asks_for_too_much_is_refused():
    with pytest.raises(FedSelectError, match="more examples than there are"):
        LabelSkew(10, 5).rows(np.arange(100) % 10, 6)


def test_digits_have_ten_clients_of_two_digits():
    seen = []
    for task in client_tasks("digits").values():
        train_x, train_y, test_x, test_y = parts(task)
        assert sorted(np.unique(train_y, return_counts=True)[1]) == [11, 11]
        assert sorted(np.unique(test_y, return_counts=True)[1]) == [76, 76]
        assert set(train_y.tolist()) == set(test_y.tolist())
        assert task.examples() == 22
        assert 0 <= train_x.min() <= train_x.max() <= 1
        seen += [rows(train_x), rows(test_x)]
    assert sum(map(len, seen)) == len(set.union(*seen))
    model = DigitsTask(0).build_model()
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [
        (64, 64),
        (32, 64),
        (10, 32),
    ]


def test_the_seed_draws_split_and_weights():
    one, same, other = DigitsTask(3), DigitsTask(3), DigitsTask(3, seed=1)
    assert rows(one._train[0]) == rows(same._train[0]) != rows(other._train[0])
    weights = [TorchLearner(task).initial() for task in (one, same, other, DigitsTask(4))]
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_array_equal(weights[0], weights[3])
    assert (weights[0] != weights[2]).any()


def test_building_a_model_leaves_the_callers_generator_alone():
    before = torch.get_rng_state()
    DigitsTask(0).build_model()
    assert torch.equal(torch.get_rng_state(), before)


def test_passes_are_shuffled_and_complete():
    task = DigitsTask(0)
    task.batch_size = 5
    one, two = ([x for x, _ in task.train_batches()] for _ in range(2))
    assert [len(batch) for batch in one] == [5, 5, 5, 5, 2]
    assert rows(torch.cat(one)) == rows(torch.cat(two)) == rows(task._train[0])
    assert not torch.equal(torch.cat(one), torch.cat(two))


def test_watch_is_split_by_person_without_overlap(watch_cache):
    tasks = client_tasks("watch", cache=watch_cache)
    assert list(tasks) == [f"subject-{i:02d}" for i in range(1, 11)]
    sizes, seen = [], []
    for task in tasks.values():
        train_x, train_y, test_x, test_y = parts(task)
        assert train_x.shape[1:] == test_x.shape[1:] == (6, 100)
        assert set(test_y.tolist()) == set(train_y.tolist()) == set(range(7))
        sizes.append(task.examples())
        seen.append(rows(train_x) | rows(test_x))
        assert not rows(train_x) & rows(test_x)
    assert 50 <= np.mean(sizes) <= 60
    assert sum(map(len, seen)) == len(set.union(*seen))
    assert sum(p.numel() for p in tasks["subject-01"].build_model().parameters()) == 4535


def test_watch_converts_once_and_unpickles_nothing_later(watch_cache, monkeypatch, tmp_path):
    first = WatchTask(3, cache=watch_cache)
    monkeypatch.setattr("fedselect.tasks.watch._convert", lambda: pytest.fail("converted again"))
    again = WatchTask(3, cache=watch_cache)
    assert all(torch.equal(a, b) for a, b in zip(parts(first), parts(again), strict=True))
    assert [path.name for path in watch_cache.iterdir()] == ["watch-1.npz"]


@pytest.mark.parametrize("damage", [b"", b"PK\3\4 not a zip", b"\x80\x04N."])
def test_a_damaged_watch_cache_is_made_anew(tmp_path, damage):
    (tmp_path / "watch-1.npz").write_bytes(damage)
    assert WatchTask(1, cache=tmp_path).examples() > 0
    with np.load(tmp_path / "watch-1.npz", allow_pickle=False) as saved:
        assert saved["samples"].shape == (244102, 6)


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert WatchTask(1, cache=tmp_path / "file" / "below").examples() > 0


def test_fashion_mnist_is_scarce_and_skewed(fashion):
    tasks = client_tasks("fashion-mnist", folder=fashion)
    seen = []
    for task in tasks.values():
        train_x, train_y, test_x, test_y = parts(task)
        assert sorted(np.unique(train_y, return_counts=True)[1]) == [10] * 5
        assert sorted(np.unique(test_y, return_counts=True)[1]) == [50] * 5
        assert set(train_y.tolist()) == set(test_y.tolist())
        assert train_x.shape[1:] == (28, 28)
        assert 0 <= train_x.min() <= train_x.max() <= 1
        seen += [rows(train_x), rows(test_x)]
    assert sum(map(len, seen)) == len(set.union(*seen))
    small = FashionMnistTask(1, clients=2, classes=3, per_class=4, folder=fashion)
    assert small.examples() == 12
    assert TorchLearner(small).space.dim == 52650


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path):
    with pytest.raises(FedSelectError, match="apt-get install dataset-fashion-mnist"):
        FashionMnistTask(0, folder=tmp_path)


DAMAGED_IDX = {
    "not gzip": b"not gzip",
    "type of element": gzip.compress(b"\0\0\x0d\1" + b"\0" * 8),
    "header cut": gzip.compress(b"\0\0\x08\3\0\0"),
    "elements missing": gzip.compress(b"\0\0\x08\1\0\0\0\5abc"),
    "empty": gzip.compress(b""),
    "stream cut": gzip.compress(b"abc" * 100)[:-20],
}


# Named, since gzip writes the time into its bytes and workers must collect the same tests.
@pytest.mark.parametrize("data", DAMAGED_IDX.values(), ids=DAMAGED_IDX.keys())
def test_a_damaged_idx_file_is_refused(tmp_path, data):
    (tmp_path / "x.gz").write_bytes(data)
    with pytest.raises(FedSelectError, match=r"x\.gz"):
        read_idx(tmp_path / "x.gz")


@pytest.mark.parametrize(
    "build", [lambda: DigitsTask(10), lambda: WatchTask(0), lambda: FashionMnistTask(-1)]
)
def test_there_is_no_such_client(build):
    with pytest.raises(FedSelectError, match="must be"):
        build()


# --- loading -------------------------------------------------------------------------------------


def test_a_task_loads_from_a_package_with_arguments(watch_cache):
    arguments = task_arguments(["subject=3", f"cache={watch_cache}"])
    task = load_task("fedselect.tasks.watch:WatchTask", **arguments)
    assert isinstance(task, WatchTask)
    assert task.examples() == WatchTask(3, cache=watch_cache).examples()


def test_a_task_loads_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from fedselect.tasks.digits import DigitsTask\n"
        "class Mine(DigitsTask):\n    pass\n"
        "def build(client):\n    return Mine(client)\n"
    )
    for name in ("Mine", "build"):
        task = load_task(f"{tmp_path}/mine.py:{name}", client=2)
        assert type(task).__name__ == "Mine"


def test_task_arguments_are_json_where_they_can_be():
    found = task_arguments(["a=3", "b=x=y", "c=true", "d=[1, 2]", "e=", "f=007"])
    assert found == {"a": 3, "b": "x=y", "c": True, "d": [1, 2], "e": "", "f": "007"}
    for wrong in ("a", "a b=3", "=3"):
        with pytest.raises(FedSelectError, match="name=value"):
            task_arguments([wrong])


@pytest.mark.parametrize(
    ("spec", "arguments", "text"),
    [
        ("fedselect.tasks.watch", {}, "package.module:Name"),
        (":WatchTask", {}, "package.module:Name"),
        ("no_such_package.tasks:Mine", {}, "no module 'no_such_package'"),
        ("fedselect.tasks.nothing:Mine", {}, "no module 'fedselect.tasks.nothing'"),
        ("fedselect.tasks.digits:Digits", {}, "its tasks are .*DigitsTask"),
        ("fedselect.tasks.digits:DigitsTask", {}, "could not be built.*client"),
        ("fedselect.tasks.digits:DigitsTask", {"site": 1}, "could not be built.*site"),
        ("fedselect.space:Role", {"value": "shared"}, "not a fedselect.Task"),
        ("nowhere/mine.py:Mine", {}, "no file nowhere/mine.py"),
    ],
)
def test_what_is_wrong_with_a_task_is_said(spec, arguments, text):
    with pytest.raises(FedSelectError, match=text) as caught:
        load_task(spec, **arguments)
    assert caught.value.code == "task_invalid"


def test_a_module_that_a_task_needs_is_named(tmp_path, monkeypatch):
    (tmp_path / "needy_task_module.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FedSelectError, match="needs the module 'no_such_dependency'"):
        load_task("needy_task_module:Mine")
    assert "needy_task_module" not in sys.modules


def test_unknown_examples_are_named():
    with pytest.raises(FedSelectError, match="watch, digits, fashion-mnist"):
        client_tasks("cifar")


def test_example_tasks_need_no_declared_roles():
    task = DigitsTask(0)
    assert isinstance(task, Task)
    assert {slot.role for slot in TorchLearner(task).space.slots} == {Role.SELECTABLE, Role.SHARED}
