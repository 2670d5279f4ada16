"""Ready-made example tasks, and loading a task by name or by ``package:Class``.

Owns the registry and the loader. Must not load torch or any data until a task is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fedselect.errors import FedSelectError
from fedselect.task import Task

# name → (task, the argument that tells clients apart, its values, what a client is called)
_EXAMPLES: Mapping[str, tuple[str, str, Sequence[int], str]] = {
    "watch": ("fedselect.tasks.watch:WatchTask", "subject", range(1, 11), "subject"),
    "digits": ("fedselect.tasks.digits:DigitsTask", "client", range(10), "site"),
    "fashion-mnist": (
        "fedselect.tasks.fashion_mnist:FashionMnistTask",
        "client",
        range(10),
        "site",
    ),
}
_FASHION = ("20x5", "labels", "rotation", "contrast", "inversion", "mixed", "dirichlet", "shards")
_LARGEST = (33, 62, 81, 85, 96, 99, 102, 106, 107, 108, 111, 112, 114, 115, 117, 118, 123, 124)
# name in ``federations`` → (numbers of its clients, what a client is called)
_FEDERATIONS: Mapping[str, tuple[Sequence[int], str]] = {
    "vowel": (range(15), "speaker"),
    "chem97": ((*_LARGEST, 128, 130), "authority"),
    **{f"fashion-{kind}": (range(20), "site") for kind in _FASHION},
    "mnist": (range(20), "site"),
    "digits-dirichlet": (range(10), "site"),
    "digits-mixed": (range(12), "site"),
}
EXAMPLES = (*_EXAMPLES, *_FEDERATIONS)
SPLIT = "split:"  # before the path of a manifest
Client = tuple[str, dict[str, Any]]  # the spec of a task, and its arguments


def example_clients(name: str) -> dict[str, Client]:
    """How each client of a federation gets its task: (spec, arguments), by client name.

    ``name`` is that of an example, or ``split:FILE`` of a saved split.

    Raises:
        FedSelectError: no such example, or not a manifest.
    """
    if name.startswith(SPLIT):
        return _split_clients(Path(name.removeprefix(SPLIT)))
    if name in _FEDERATIONS:
        numbers, noun = _FEDERATIONS[name]
        spec = "fedselect.tasks.federations:client_task"
        return {f"{noun}-{n:02d}": (spec, {"federation": name, "client": n}) for n in numbers}
    if name not in _EXAMPLES:
        raise _error(
            f"there is no example task {name!r}; there are {', '.join(EXAMPLES)}, and split:FILE "
            "of a saved split"
        )
    spec, key, values, noun = _EXAMPLES[name]
    return {f"{noun}-{value:02d}": (spec, {key: value}) for value in values}


def _split_clients(path: Path) -> dict[str, Client]:
    try:
        names = json.loads(path.read_bytes())["clients"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _error(f"{path} is no split manifest: {error}") from error
    spec = "fedselect.tasks.federations:manifest_task"
    return {str(client): (spec, {"manifest": str(path), "client": client}) for client in names}


def client_tasks(name: str, **arguments: Any) -> dict[str, Task]:
    """All clients of an example federation, by client name; ``arguments`` go to every task.

    Raises:
        FedSelectError: no such example, or its data is missing.
    """
    clients = example_clients(name).items()
    return {client: load_task(spec, **own, **arguments) for client, (spec, own) in clients}


def load_task(spec: str, /, **arguments: Any) -> Task:
    """The task that ``package.module:Name`` or ``path/to/file.py:Name`` builds.

    ``Name`` is a subclass of ``fedselect.Task`` or a function that returns one; ``arguments`` are
    passed to it, which is how one class serves many sites.

    Raises:
        FedSelectError: with code ``task_invalid``, saying what to change.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise _error(f"a task is written package.module:Name or file.py:Name, got {spec!r}")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_package(place)
    builder = getattr(module, name, None)
    if not callable(builder):
        found = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Task)]
        raise _error(f"{place} has no {name!r}; its tasks are {', '.join(found) or 'none'}")
    try:
        task = builder(**arguments)
    except TypeError as error:
        raise _error(
            f"{spec} could not be built with {arguments or 'no arguments'}: {error}"
        ) from error
    if not isinstance(task, Task):
        raise _error(f"{spec} gave {type(task).__name__}, not a fedselect.Task")
    return task


def task_arguments(pairs: Iterable[str]) -> dict[str, Any]:
    """Arguments of a task from ``key=value`` texts; a value that is JSON counts as JSON.

    Raises:
        FedSelectError: a text without ``=``, or a key that is no Python name.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise _error(f"a task argument is written name=value, got {pair!r}")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


def _from_package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if name == missing or name.startswith(missing + "."):
            raise _error(
                f"there is no module {missing!r} here; install its package, or start in (or set "
                "PYTHONPATH to) the folder that holds it"
            ) from error
        raise _error(f"{name} needs the module {missing!r}: install it") from error
    except ImportError as error:
        raise _error(f"{name} could not be imported: {error}") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise _error(f"there is no file {path}")
    name = f"fedselect_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise _error(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up
    spec.loader.exec_module(module)
    return module


def _error(text: str) -> FedSelectError:
    return FedSelectError(text, code="task_invalid")
