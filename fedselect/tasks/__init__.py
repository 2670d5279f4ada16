"""Ready-made example tasks, and loading a task by name or by ``package:Class``.

Owns the registry and the loader. Must not load torch or any data until a task is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fedselect.errors import FedSelectError
from fedselect.task import Task

# name → (task, the argument that tells clients apart, its values, what a client is called)
_EXAMPLES: Mapping[str, tuple[str, str, range, str]] = {
    "watch": ("fedselect.tasks.watch:WatchTask", "subject", range(1, 11), "subject"),
    "digits": ("fedselect.tasks.digits:DigitsTask", "client", range(10), "site"),
    "fashion-mnist": (
        "fedselect.tasks.fashion_mnist:FashionMnistTask",
        "client",
        range(10),
        "site",
    ),
}
EXAMPLES = tuple(_EXAMPLES)


def example_clients(name: str) -> dict[str, tuple[str, dict[str, int]]]:
    """How each client of an example federation gets its task: (spec, arguments), by client name.

    Raises:
        FedSelectError: no such example.
    """
    if name not in _EXAMPLES:
        raise _error(f"there is no example task {name!r}; there are {', '.join(EXAMPLES)}")
    spec, key, values, noun = _EXAMPLES[name]
    return {f"{noun}-{value:02d}": (spec, {key: value}) for value in values}


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
