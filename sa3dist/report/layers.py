"""The picture of layers: a row per kind of layer, a column per block of the network."""

import dataclasses
import re
from typing import Any

from sa3dist.report.run_folder import is_number

FIGURES = {"update_ratio": "size of the update", "effective_rank": "effective rank", "drift": "magnitude drift"}
_BLOCK = re.compile(r"(?<=\.)(\d+)(?=\.)")


@dataclasses.dataclass(frozen=True)
class LayerPicture:
    """Figures of all layers.

    blocks          block numbers of the columns
    rows            (kind of layer, figures or None per block)
    others          figures of layers outside blocks
    learning_most   figures of the layers with the largest updates
    """

    blocks: list[int]
    rows: list[tuple[str, list[dict[str, Any] | None]]]
    others: list[dict[str, Any]]
    learning_most: list[dict[str, Any]]


def layer_picture(layers: Any, most: int = 8) -> LayerPicture | None:
    """The picture of the ``layers`` in a row of health.jsonl, if any. most: length of ``learning_most``."""
    valid = [layer for layer in map(_layer, layers if isinstance(layers, list) else ()) if layer]
    if not valid:
        return None
    kinds: dict[str, dict[int, dict[str, Any]]] = {}
    others = []
    for layer in valid:
        block = _BLOCK.search(layer["name"])
        if block is None:
            others.append(layer)
        else:
            kinds.setdefault(layer["name"][block.end() + 1 :], {})[int(block[1])] = layer
    blocks = sorted({block for by_block in kinds.values() for block in by_block})
    rows = [(kind, [by_block.get(block) for block in blocks]) for kind, by_block in kinds.items()]
    ranked = sorted(valid, key=lambda layer: layer.get("update_ratio", 0.0), reverse=True)
    return LayerPicture(blocks, rows, others, ranked[:most])


def _layer(value: Any) -> dict[str, Any] | None:
    """The layer's name and its FIGURES, as far as they are numbers."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    figures = {}
    for key in FIGURES:
        number = value.get(key)
        # Drift is a number, or a dict like the run's.
        number = number.get("mean") if isinstance(number, dict) else number
        if is_number(number):
            figures[key] = number
    return {"name": value["name"], **figures}
