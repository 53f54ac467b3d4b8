"""Values as people write them, in YAML and as key=value: what a text means hangs on the field it is for."""

from __future__ import annotations

import os
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from sa3dist.settings import Settings

_NULL_TAGS = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
_NULLS = ("null", "Null", "NULL")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WHOLE = re.compile(r"[+-]?[0-9]+(?:_[0-9]+)*")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
# Python refuses to read more digits than 4300; no setting needs as many.
_MAX_DIGITS = 100


class _AsWritten(yaml.SafeLoader):
    """Every scalar as its text, but for null: YAML 1.1 makes 1.1 of 1.10, 7 of 007, 45000 of 12:30:00, true of on."""


_AsWritten.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _NULL_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def value_type(field: str) -> Any:
    """The type of a field, without None: int, float, bool, str, Path, list[str] or a Literal."""
    annotation = Settings.model_fields[field].annotation
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(option for option in typing.get_args(annotation) if option is not type(None))
    return annotation


def split_word(word: str) -> tuple[str, str] | None:
    """(key, text) of a key=value word; None for a config file. What follows a field's name is never looked for."""
    key, equals, text = word.partition("=")
    # A path may hold "=" too; a key never holds a separator.
    if not equals or (key not in Settings.model_fields and ("/" in key or os.path.exists(word))):
        return None
    return key, text


def of_word(field: str, text: str) -> Any:
    """The value of ``field=text`` on a command line. ``null`` and nothing at all unset what can be unset."""
    if field in Settings.model_fields and Settings.model_fields[field].default is None and text in _NULLS:
        return None
    return of_text(field, text)


def of_text(field: str, text: str) -> Any:
    """Text and paths as typed, numbers in decimal, [a, b] as a list.

    What a field cannot be stays text, for the field to refuse.
    """
    if field not in Settings.model_fields:
        return text
    kind = value_type(field)
    if typing.get_origin(kind) is list:
        return _items(text)
    if kind is bool:
        return _BOOLEANS.get(text.lower(), text)
    if len(text) <= _MAX_DIGITS:
        if kind in (int, float) and _WHOLE.fullmatch(text):
            return kind(text)
        if kind is float and _DECIMAL.fullmatch(text):
            return float(text)
    return text


def read_yaml(text: str) -> Any:
    """The document in ``text``; the scalars of its top level as ``of_text`` reads them, others as they are written.

    Raises yaml.YAMLError, and ValueError where what follows a path could be part of it or a comment.
    """
    loader = _AsWritten(text)
    try:
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            for key, value in root.value:
                _refuse_doubtful_comment(text, key, value)
        found = None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()
    if not isinstance(found, dict):
        return found
    return {key: of_text(key, value) if isinstance(value, str) else value for key, value in found.items()}


def _refuse_doubtful_comment(text: str, key: yaml.Node, value: yaml.Node) -> None:
    """``packs/Loops #1`` is ``packs/Loops`` to YAML, and another folder to who wrote it."""
    if not isinstance(value, yaml.ScalarNode) or value.style or key.value not in Settings.model_fields:
        return
    doubtful = re.compile(r"[ \t]+(#[^\s#].*)").match(text, value.end_mark.index)
    if doubtful and value_type(key.value) in (str, Path):
        raise ValueError(
            f"line {value.end_mark.line + 1}: {doubtful[1][:60]!r} behind {key.value} may be part of it or a comment; "
            f"put the value in quotes, or a space behind the #"
        )


def _items(text: str) -> str | list[str]:
    """``[a, "b", layers.[0-11].]`` as a list; anything else is one pattern.

    Not by YAML, whose plain text inside a list ends at a bracket.
    """
    inner = text.strip()
    depth, start, items = 0, 1, []
    for at, character in enumerate(inner):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth == 0 and at < len(inner) - 1:
            return text
        if (character == "," and depth == 1) or (character == "]" and depth == 0):
            items.append(inner[start:at].strip())
            start = at + 1
    if depth or not items:
        return text
    if items[-1] == "":
        items.pop()
    return [item[1:-1] if len(item) > 1 and item[0] == item[-1] and item[0] in "'\"" else item for item in items]
