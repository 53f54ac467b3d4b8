"""Read settings from YAML, JSON and key=value arguments; explain in words what is wrong with them."""

import collections
import contextlib
import difflib
import json
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from sa3dist.data.remote.local_paths import can_be_named, expand_home, is_text
from sa3dist.errors import ConfigError, read_duration
from sa3dist.request.fields import PRECISION_ALIASES
from sa3dist.settings import Settings

# Names other trainers use, for keys where the nearest spelling would be the wrong suggestion.
OTHER_TRAINERS = {"steps": "number_of_steps", "max_steps": "number_of_steps", "lr": "learning_rate"}
# Keeps messages readable whatever was pasted.
MAX_SHOWN_CHARACTERS = 200
_NULL_TAGS = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
_NULLS = ("null", "Null", "NULL")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WHOLE = re.compile(r"[+-]?[0-9]+(?:_[0-9]+)*")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
# A list in brackets, whose items may contain bracket pairs, and the commas outside of those.
_LIST = re.compile(r"\[((?:[^][]|\[[^][]*\])*)\]", re.DOTALL)
_COMMA = re.compile(r",(?![^[]*\])")
# Python refuses to parse more than 4300 digits; no setting needs as many.
_MAX_DIGITS = 100


def read_file(path: str) -> dict[str, Any]:
    """Keys and values of a YAML config or JSON request. Raises ConfigError, naming the file, when it is neither.

    In JSON, quotes tell text from numbers; in YAML, the type of the field does.
    """
    is_json, label = path.lower().endswith(".json"), _escaped(path)
    try:
        text = Path(expand_home(path)).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        hint = f"; a setting is given as {path}=..." if path in Settings.model_fields else ""
        if path and isinstance(error, IsADirectoryError | UnicodeDecodeError):
            hint = "; a config is UTF-8 text, a data set is given as audio_data_url=..."
        raise ConfigError(f"{label or repr(path)}: cannot read this config file ({_reason(error)}){hint}") from error
    try:
        value = json.loads(text, object_pairs_hook=each_once) if is_json else read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{label}: not valid YAML: {_reason(error)}; a value with ': ', ' #' or brackets in it needs quotes"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{label}: {'not valid JSON: ' if is_json else ''}{_reason(error)}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{label}: holds a {type(value).__name__}, expected keys with values such as `rank: 16`")
    return value


def read_arguments(arguments: list[str], merged: dict[str, Any] | None = None) -> dict[str, Any]:
    """Merge config files and key=value overrides; later ones win.

    merged   keeps what could be read even when a file is unreadable: its output_dir receives the failure's status.json
    """
    merged = {} if merged is None else merged
    unreadable: ConfigError | None = None
    for argument in arguments:
        setting = split_argument(argument)
        if setting is not None:
            key, text = setting
            # ``null`` unsets a setting whose default is unset.
            can_be_unset = key in Settings.model_fields and Settings.model_fields[key].default is None
            merged[key] = None if can_be_unset and text in _NULLS else parse_value(key, text)
            continue
        try:
            merged.update(read_file(argument))
        except ConfigError as error:
            unreadable = unreadable or error
    if unreadable is not None:
        raise unreadable
    return merged


def build(values: dict[str, Any]) -> Settings:
    """Validate raw values. Raises ConfigError with one line per field that is unknown, missing or out of range."""
    for key in values:
        if isinstance(key, str) and not is_text(key):
            raise ConfigError(f"{_escaped(key)}: unknown key; sa3dist train --help lists all keys")
    try:
        return Settings(**values)
    except ValidationError as error:
        raise ConfigError(_escaped("\n".join(explain(problem) for problem in error.errors()))) from error
    except TypeError as error:
        odd = [key for key in values if not isinstance(key, str)]
        raise ConfigError(f"config: {odd[0]!r} is no key, expected words such as `rank: 16`") from error


def output_dir_of(values: dict[str, Any]) -> Path:
    """The directory for a run's status.json, even when its settings do not validate."""
    chosen, name = values.get("output_dir"), values.get("name")
    if isinstance(chosen, str | Path) and str(chosen):
        # Validation reports a home directory that does not exist.
        with contextlib.suppress(ConfigError):
            if can_be_named(found := Path(expand_home(chosen))):
                return found
    # JSON may hold a number here; the field accepts it as text.
    name = str(name) if isinstance(name, str | int | float) and not isinstance(name, bool) else ""
    usable = name and "/" not in name and name not in (".", "..") and can_be_named(name)
    return Path("runs") / (name if usable else Settings.model_fields["name"].default)


def _escaped(text: str) -> str:
    """``text`` with bytes that are not UTF-8 escaped: status.json could not hold them."""
    return text.encode(errors="backslashreplace").decode()


def _reason(error: Exception) -> str:
    """A library's error message on one line, without the file name."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def explain(problem: dict[str, Any]) -> str:
    """One validation problem as ``field: what is wrong``."""
    field = str(problem["loc"][0]) if problem["loc"] else ""
    kind = problem["type"]
    if kind == "extra_forbidden":
        near = [OTHER_TRAINERS[field]] if field in OTHER_TRAINERS else []
        near = near or difflib.get_close_matches(field, Settings.model_fields, n=1, cutoff=0.5)
        return f"{field}: unknown key" + (
            f", did you mean {near[0]}?" if near else "; sa3dist train --help lists all keys"
        )
    if kind == "missing":
        return f"{field}: missing; give it in the config file or as {field}=..."
    if kind == "value_error":
        message = str(problem["ctx"]["error"])
        return message if not field else f"{field}: {message}"
    return f"{field}: {_shortened(repr(problem['input']))} is not valid, expected {allowed_values(field)}"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def allowed_values(field: str) -> str:
    """What a field accepts, in words: its range, its choices or its type."""
    info = Settings.model_fields[field]
    bounds = {name: getattr(item, name) for item in info.metadata for name in ("ge", "gt", "le") if hasattr(item, name)}
    kinds = value_types(field)
    if typing.get_origin(kinds[0]) is Literal:
        aliases = [alias for alias in PRECISION_ALIASES if field == "base_precision"]
        return "one of " + ", ".join([*typing.get_args(kinds[0]), *aliases])
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    text = ", ".join(words.get(kind, "a list of text") for kind in kinds)
    if read_duration in (getattr(item, "func", None) for item in info.metadata):
        text = "seconds, H:MM:SS or D-H:MM:SS"
    if "gt" in bounds:
        text = text.replace("a number", "a finite number")
        return f"{text} above {bounds['gt']}" + (f", at most {bounds['le']}" if "le" in bounds else "")
    if "le" in bounds:
        return f"{text}, {bounds['ge']}..{bounds['le']}"
    if "ge" in bounds:
        return f"{text}, {bounds['ge']} or more"
    return text


def help_text() -> str:
    """For each key: its meaning, what it accepts, and its default."""
    lines = []
    for field, info in Settings.model_fields.items():
        shown = {"None": "unset", "True": "true", "False": "false"}.get(str(info.default), info.default)
        default = "required" if info.is_required() else f"default {shown}"
        lines.append(f"  {field}\n      {info.description} ({allowed_values(field)}; {default})")
    return "\n".join(lines)


class _AsWritten(yaml.SafeLoader):
    """Reads scalars but null as text: YAML 1.1 turns 1.10 into 1.1, 007 into 7, 12:30:00 into 45000, on into true."""


_AsWritten.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _NULL_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def value_types(field: str) -> list[Any]:
    """The types a field may have, without None: int, float, bool, str, Path, list[str] or a Literal."""
    annotation = Settings.model_fields[field].annotation
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return [option for option in typing.get_args(annotation) if option is not type(None)]
    return [annotation]


def value_type(field: str) -> Any:
    """The first of ``value_types``, which decides how text is read."""
    return value_types(field)[0]


def split_argument(argument: str) -> tuple[str, str] | None:
    """(key, text) of a key=value argument; None for a config file. ``key=...`` with a known key is never a file."""
    key, equals, text = argument.partition("=")
    # A path may contain "=" too, but a key contains no path separator.
    if not equals or (key not in Settings.model_fields and ("/" in key or os.path.exists(argument))):
        return None
    return key, text


def parse_value(field: str, text: str) -> Any:
    """Convert text to the field's type: text and paths unchanged, decimal numbers, [a, b] as a list.

    Text that does not fit the type stays text, which validation then refuses.
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
    """Parse a YAML document; top-level scalars are read by ``parse_value``, nested ones stay text.

    Raises yaml.YAMLError; ValueError where text after a path could be part of it or a comment.
    """
    loader = _AsWritten(text)
    try:
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            each_once([(key.value, None) for key, _ in root.value if isinstance(key, yaml.ScalarNode)])
            for key, value in root.value:
                if isinstance(key, yaml.ScalarNode):
                    _refuse_doubtful_comment(text, key, value)
        found = None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()
    if not isinstance(found, dict):
        return found
    return {key: parse_value(key, value) if isinstance(value, str) else value for key, value in found.items()}


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Pairs as a dict. Raises ValueError for a repeated key, of which readers keep either the first or the last."""
    counts = collections.Counter(key for key, _ in pairs)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"{', '.join(twice)}: given more than once; keep one")
    return dict(pairs)


def _refuse_doubtful_comment(text: str, key: yaml.Node, value: yaml.Node) -> None:
    """Refuse ``packs/Loops #1``: YAML reads ``packs/Loops``, but the author may mean a folder ``Loops #1``."""
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

    Not parsed as YAML, whose plain text inside a list ends at a bracket.
    """
    found = _LIST.fullmatch(text.strip())
    if found is None:
        return text
    items = [item.strip() for item in _COMMA.split(found[1])]
    # Empty after ``[]`` or a comma behind the last item.
    if items[-1] == "":
        items.pop()
    return [item[1:-1] if len(item) > 1 and item[0] == item[-1] and item[0] in "'\"" else item for item in items]
