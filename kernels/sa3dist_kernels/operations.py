"""Operations of our own, which torch.compile does not look into."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("sa3dist", "FRAGMENT")


def define(schema: str, function: Callable, shapes: Callable) -> None:
    """Make ``torch.ops.sa3dist.NAME`` of a schema "NAME(...) -> ...".

    Not by ``custom_op``, whose calls take 28 us of a host instead of 8.

    function   computes it on any device, without autograd     shapes   empty results, for the compiler
    """
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name, *_ = schema.partition("(")
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sa3dist::{name}", shapes, lib=_LIBRARY)
