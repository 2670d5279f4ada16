"""A YAML text as plain data, and where in the text each value stands.

Owns what is taken: the words of YAML 1.2 (``no`` and ``on`` are texts, ``010`` is ten), no aliases,
no tags of programs, no key twice, at most 256 KiB and 20 levels. Must not open files, nor know what
a text is about.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

MOST = 256 * 1024  # characters
DEEPEST = 20
Path = tuple[str | int, ...]


class MisspeltError(Exception):
    """A text that is not taken: ``line`` counts from 1, ``problem`` is for people."""

    def __init__(self, problem: str, line: int = 1) -> None:
        super().__init__(problem)
        self.problem, self.line = problem, line


@dataclass(frozen=True)
class Document:
    """What a text says; ``lines`` has the line, from 1, of every value by its path."""

    data: Any
    lines: dict[Path, int] = field(default_factory=dict)

    def line(self, path: Path) -> int:
        """The line of a value, or of the nearest one around it that is there."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read(text: str) -> Document:
    """The one document of a text; an empty one says None.

    Raises:
        MisspeltError: not YAML, or more of it than is taken.
    """
    if len(text) > MOST:
        raise MisspeltError(f"the file has {len(text):,} characters; {MOST:,} are taken")
    found = Document(None)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "not YAML"
        raise MisspeltError(problem, mark.line + 1 if mark else 1) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise MisspeltError("a character that cannot be shown stands here", line) from error
    return found if node is None else Document(_plain(node, (), found.lines), found.lines)


class _Loader(yaml.SafeLoader):
    """Composes nodes; values are made of them by :func:`_plain` alone."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]  # as in the code
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node with all below it.

        Raises:
            yaml.composer.ComposerError: an alias, or too deep.
        """
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # in the stubs
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not taken: write the value out", mark
            )
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, "nested too deep", mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


_NULL, _BOOL, _INT, _FLOAT, _STR, _SEQ, _MAP = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")
)
# The core schema of YAML 1.2 (§10.3.2), without octal and hexadecimal numbers.
for _tag, _form, _first in (
    (_NULL, r"(?:null|~|)", ["n", "~", ""]),
    (_BOOL, r"(?:true|false)", ["t", "f"]),
    (_INT, r"[-+]?[0-9]{1,19}", list("-+0123456789")),
    (_FLOAT, r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(_tag, re.compile(f"{_form}\\Z"), _first)


def _plain(node: Any, path: Path, lines: dict[Path, int]) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if node.tag == _MAP and isinstance(node, yaml.MappingNode):
        return _mapping(node, path, lines)
    if node.tag == _SEQ and isinstance(node, yaml.SequenceNode):
        return [_plain(each, (*path, n), lines) for n, each in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    raise MisspeltError(f"{node.tag!r} is not taken here", node.start_mark.line + 1)


def _mapping(node: yaml.MappingNode, path: Path, lines: dict[Path, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.value:
        line, name = key.start_mark.line + 1, key.value
        if key.tag != _STR or not isinstance(name, str):
            raise MisspeltError(f"{name!r} cannot name a setting: a name is a text", line)
        if name in found:
            raise MisspeltError(f"{name} is there twice; keep one", line)
        lines[*path, name] = line
        found[name] = _plain(value, (*path, name), lines)
    return found


def _scalar(node: yaml.ScalarNode) -> Any:
    text: str = node.value
    try:
        return _SCALARS[node.tag](text)
    except (KeyError, ValueError):
        raise MisspeltError(
            f"{text!r} is not taken as {node.tag!r}", node.start_mark.line + 1
        ) from None


_SCALARS: dict[str, Callable[[str], Any]] = {
    _NULL: lambda _: None,
    _BOOL: lambda text: {"true": True, "false": False}[text],
    _INT: int,
    _FLOAT: float,
    _STR: str,
}
