# SPDX-License-Identifier: Apache-2.0
"""YAML as data and nothing else: no tags, no duplicate keys, bounded aliases, and the line of every value.

PyYAML's own loaders keep the last of two equal keys and expand aliases without limit (a file of 1 kB can ask for
gigabytes). Here the event stream is checked first (depth, tags), then the node graph is walked once with a budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moat_gateway.errors import GatewayError

MAX_BYTES = 4 << 20  # bytes of one file
MAX_NODES = 200_000  # values after the expansion of aliases
MAX_TEXT = 4 * MAX_BYTES  # characters of all values after the expansion of aliases
MAX_DEPTH = 40  # levels of nesting
MAX_NUMBER = 64  # characters of a number

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where the wheel has it: ten times faster
_PREFIX = "tag:yaml.org,2002:"
_SCALARS = frozenset(_PREFIX + t for t in ("str", "int", "float", "bool", "null", "timestamp"))
_NUMBERS = frozenset((_PREFIX + "int", _PREFIX + "float"))
_MERGE = _PREFIX + "merge"

Trail = tuple[str | int, ...]


def dotted(trail: Trail) -> str:
    """Return a trail as people write it: ``model_list[0].litellm_params.api_base``."""
    out = ""
    for step in trail:
        out += f"[{step}]" if isinstance(step, int) else f".{step}" if out else str(step)
    return out or "the file"


@dataclass(frozen=True)
class Document:
    """A parsed file.

    Attributes:
        data: plain values (mappings are ``dict``, sequences ``list``).
        lines: the line, from 1, of each value by its trail of keys and indexes.
    """

    data: Any
    lines: Mapping[Trail, int]

    def line(self, trail: Trail) -> int | None:
        """Return the line of a value, or of the nearest parent that has one."""
        while trail not in self.lines and trail:
            trail = trail[:-1]
        return self.lines.get(trail)


def read(path: Path, error: type[GatewayError]) -> Document:
    """Read one file.

    Raises:
        GatewayError: of class ``error``: it cannot be read, or :func:`parse` refuses it.
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise error(
            "cannot be read",
            found=e.strerror or str(e),
            hint="check that the file exists and that the gateway's user may read it",
            path=str(path),
        ) from e
    return parse_bytes(raw, name=str(path), error=error)


def parse_bytes(raw: bytes, *, name: str, error: type[GatewayError]) -> Document:
    """Parse the bytes of one file.

    Raises:
        GatewayError: of class ``error``: too large, not UTF-8, or :func:`parse` refuses it.
    """
    if len(raw) > MAX_BYTES:
        raise error(
            "is too large",
            found=f"{len(raw)} bytes",
            expected=f"at most {MAX_BYTES}",
            hint="this is not the file that was meant, or something filled it",
            path=name,
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise error("is not UTF-8 text", found=f"byte {e.start}", hint="save it as UTF-8", path=name) from e
    return parse(text, name=name, error=error)


def parse(text: str, *, name: str, error: type[GatewayError]) -> Document:
    """Parse one document.

    Raises:
        GatewayError: of class ``error``, with ``path`` set to ``name`` and the line: not YAML, two documents,
            a tag, a duplicate key, a merge of something else than mappings, too deep, too many values, a number that
            is too long.
    """
    try:
        _check_events(text, name, error)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        raise error(
            f"is not valid YAML: {getattr(e, 'problem', None) or str(e).splitlines()[0]}",
            hint="correct the line; indent with spaces",
            path=name,
            line=mark.line + 1 if mark is not None else None,
        ) from e
    if node is None:
        return Document(None, {})
    walker = _Walker(name, error)
    return Document(walker.value(node, ()), walker.lines)


def _check_events(text: str, name: str, error: type[GatewayError]) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.events.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise error(
                    "is nested too deeply",
                    expected=f"at most {MAX_DEPTH} levels",
                    hint="write it flatter",
                    path=name,
                    line=_line(event),
                )
        elif isinstance(event, yaml.events.CollectionEndEvent):
            depth -= 1
        tag = getattr(event, "tag", None)
        # A quoted scalar has the tag "!" with libyaml: it is not a tag that anybody wrote.
        if tag not in (None, "!"):
            raise error(
                "holds a YAML tag",
                found=tag,
                expected="plain values",
                hint="remove the tag; data cannot ask for types",
                path=name,
                line=_line(event),
            )


def _line(thing: yaml.Node | yaml.Event) -> int:
    return thing.start_mark.line + 1 if thing.start_mark is not None else 1


class _Walker:
    def __init__(self, name: str, error: type[GatewayError]) -> None:
        self._name = name
        self._error = error
        self._open: set[int] = set()  # nodes that are being walked: an alias to one of them is a loop
        self._count = 0
        self._text = 0
        self._scalars = yaml.constructor.SafeConstructor()
        self.lines: dict[Trail, int] = {}

    def value(self, node: yaml.Node, trail: Trail) -> Any:
        line = _line(node)
        self.lines.setdefault(trail, line)
        self._count += 1
        if self._count > MAX_NODES:
            raise self._refuse(
                "expands to too many values", line, f"at most {MAX_NODES}", "write out what the aliases repeat"
            )
        if isinstance(node, yaml.ScalarNode):
            self._text += len(node.value)
            if self._text > MAX_TEXT:
                raise self._refuse(
                    "expands to too much text",
                    line,
                    f"at most {MAX_TEXT} characters",
                    "write out what the aliases repeat",
                )
            return self._scalar(node, line)
        if id(node) in self._open:
            raise self._refuse("holds an alias to itself", line, None, "remove the alias")
        if len(trail) > MAX_DEPTH:
            raise self._refuse("is nested too deeply", line, f"at most {MAX_DEPTH} levels", None)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(child, (*trail, i)) for i, child in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode)  # noqa: S101 - the three kinds of node there are
            return self._mapping(node, trail)
        finally:
            self._open.discard(id(node))

    def _scalar(self, node: yaml.ScalarNode, line: int) -> Any:
        if node.tag not in _SCALARS:
            raise self._refuse(f"holds a value of type {node.tag}", line, "plain values", "quote it")
        # Before it is made: YAML reads 1:30 as 90, to the base of sixty, and a long one takes the square of its length.
        if node.tag in _NUMBERS and (":" in node.value or len(node.value) > MAX_NUMBER):
            raise self._refuse(
                "holds a number with colons" if ":" in node.value else "holds a number that is too long",
                line,
                f"at most {MAX_NUMBER} digits, no colons",
                "put quotation marks around it if it is text",
            )
        try:
            return self._scalars.construct_object(node)
        except (ValueError, OverflowError) as e:
            raise self._refuse(f"holds a value that cannot be read: {e}", line, None, "quote it if it is text") from e

    def _mapping(self, node: yaml.MappingNode, trail: Trail) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        own: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            line = _line(key_node)
            if key_node.tag == _MERGE:
                for part in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    if not isinstance(part, yaml.MappingNode):
                        raise self._refuse(
                            "merges something else than a mapping", line, "<<: *anchor of a mapping", None
                        )
                    merged = {**self.value(part, trail), **merged}
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._refuse("holds a key that is not plain text", line, "a plain key", None)
            key = self._scalar(key_node, line)
            if key in own:
                raise self._refuse(f"holds the key {str(key)!r} twice", line, "each key once", "remove one of the two")
            own[key] = None  # seen before its value, so that a duplicate inside is told apart from this one
            step = (*trail, key if isinstance(key, int) and not isinstance(key, bool) else str(key))
            self.lines[step] = line
            own[key] = self.value(value_node, step)
        return {**merged, **own}

    def _refuse(self, message: str, line: int, expected: str | None, hint: str | None) -> GatewayError:
        return self._error(message, expected=expected, hint=hint or "correct the line", path=self._name, line=line)
