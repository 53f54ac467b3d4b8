"""Selects the layers an adapter covers: Linear and Conv1d modules of the roots, by substrings of their names."""

from collections.abc import Iterable, Sequence

from torch import nn

from sa3dist.errors import ConfigError
from sa3dist.request.patterns import expand, too_many


def candidate_layers(roots: Iterable[nn.Module]) -> dict[str, nn.Linear | nn.Conv1d]:
    """All layers an adapter can cover, by name relative to the root, in registration order."""
    return {
        name: module
        for root in roots
        for name, module in root.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d))
    }


def normalise(patterns: Sequence[str] | None, field: str) -> tuple[str, ...] | None:
    """A pattern list as a tuple; None if unset or empty.

    Raises ConfigError for anything but a list of strings, and for ranges that expand to too many patterns.
    """
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns or ()):
        raise ConfigError(
            f"{field} is {patterns!r}, expected a list of strings, for example [self_attn, 'layers.[0-3].']"
        )
    if patterns and (problem := too_many(patterns)):
        raise ConfigError(f"{field}: {problem}")
    return tuple(patterns) if patterns else None


def select(names: Iterable[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> list[str]:
    """Names that contain an ``include`` pattern (if unset, all names) and no ``exclude`` pattern.

    Patterns are case-sensitive substrings: ``layers.1`` also matches ``layers.10``; write ``layers.1.``.
    """
    wanted = [text for pattern in include or () for text in expand(pattern)]
    unwanted = [text for pattern in exclude or () for text in expand(pattern)]
    return [
        name
        for name in names
        if (not include or any(text in name for text in wanted)) and not any(text in name for text in unwanted)
    ]


def require_match(names: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> list[str]:
    """``select``; raises ConfigError, with example names, if a list matches nothing or nothing is selected."""
    examples = f"names look like {', '.join([*names[:2], *names[-2:]])}"
    for field, patterns in (("include", include), ("exclude", exclude)):
        if patterns and not select(names, patterns, None):
            raise ConfigError(f"{field}: {list(patterns)} matches none of the {len(names)} layers; {examples}")
    selected = select(names, include, exclude)
    if not selected:
        lists = f"include {list(include or ())} and exclude {list(exclude or ())}"
        raise ConfigError(f"{lists} leave none of the {len(names)} layers; {examples}")
    return selected
