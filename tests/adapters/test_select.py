"""Layer selection: the pattern language, its traps, and the layers of the released shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sa3dist.adapters import attach_adapter, candidate_layers, select
from sa3dist.adapters.select import normalise
from sa3dist.errors import ConfigError
from sa3dist.model.base import wrapped
from sa3dist.model.conditioners import Conditioners
from sa3dist.model.dit import DiT
from sa3dist.model.parse_config import parse_model_config
from sa3dist.model.released import released_config
from sa3dist.request.patterns import expand

NAMES = [f"model.transformer.layers.{i}.{part}" for i in range(20) for part in ("self_attn.to_qkv", "ff.ff.2")]


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("self_attn", ["self_attn"]),
        ("  self_attn ", ["self_attn"]),
        ("layers.[0-2].", ["layers.0.", "layers.1.", "layers.2."]),
        ("[2-0]", ["2", "1", "0"]),
        ("[7-7]", ["7"]),
        ("[9-11]", ["9", "10", "11"]),
        ("a[0-1]b[3-2]", ["a0b3", "a0b2", "a1b3", "a1b2"]),
        ("[a-b][1]x[]", ["[a-b][1]x[]"]),
        ("[1-2-3]", ["[1-2-3]"]),
    ],
)
def test_brackets_expand_to_every_integer_and_nothing_else_is_special(pattern, texts):
    assert expand(pattern) == texts


def test_patterns_are_substrings_so_a_layer_number_needs_its_dot():
    assert len(select(NAMES, ["layers.1"], None)) == 2 * 11
    assert len(select(NAMES, ["layers.1."], None)) == 2
    assert select(NAMES, ["layers[0-11]"], None) == []
    assert len(select(NAMES, ["layers.[0-11]."], None)) == 2 * 12
    assert select(NAMES, ["LAYERS"], None) == []


def test_exclude_wins_over_include_and_empty_lists_are_unset():
    assert select(NAMES, [], []) == NAMES
    assert select(NAMES, None, None) == NAMES
    assert select(NAMES, ["layers.3."], ["ff"]) == ["model.transformer.layers.3.self_attn.to_qkv"]


@given(st.lists(st.sampled_from(["self", "ff", "layers.[3-5].", "layers.1", "qkv", "nothing"]), max_size=3), st.data())
def test_selection_follows_its_definition(include, data):
    exclude = data.draw(st.lists(st.sampled_from(["self", ".ff", "layers.[0-9].", "x"]), max_size=2))

    def occurs(patterns, name):
        return any(text in name for pattern in patterns for text in expand(pattern))

    expected = [name for name in NAMES if (not include or occurs(include, name)) and not occurs(exclude, name)]
    assert select(NAMES, include, exclude) == expected


@pytest.mark.parametrize(("shape", "count"), [("medium-base", 229), ("small-music-base", 193), ("small-sfx-base", 193)])
def test_released_shapes_have_the_reference_number_of_layers(shape, count):
    config = parse_model_config(released_config(shape), shape)
    with torch.device("meta"):
        roots = wrapped(DiT(config.dit)), Conditioners(config)
    layers = candidate_layers(roots)
    assert len(layers) == count
    assert [name for name in layers if not name.startswith("model.")] == [
        "conditioners.seconds_total.embedder.embedding.1"
    ]
    adapted = sum(layer.weight.numel() for name, layer in layers.items() if name.startswith("model."))
    assert round(adapted / 1e6, 1) == {229: 1452.3, 193: 458.6}[count]


class Tree(nn.Module):
    """The smallest thing an adapter can be attached to."""

    def __init__(self, **layers):
        super().__init__()
        self.model = nn.ModuleDict({"model": nn.ModuleDict(layers)})

    @property
    def adapter_roots(self):
        return (self.model,)

    def fp32_weight(self, name, device):
        return self.model.get_submodule(name).weight.detach()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"include": ["to_qkv"]},
            r"include: \['to_qkv'\] matches none of the 2 layers; names look like model.wide, model",
        ),
        ({"exclude": ["to_qkv"]}, r"exclude: \['to_qkv'\] matches none of the 2 layers"),
        ({"include": ["wide"], "exclude": ["model"]}, "leave none of the 2 layers"),
        ({"include": "wide"}, "include is 'wide', expected a list of strings"),
        ({"exclude": [3]}, r"exclude is \[3\], expected a list of strings"),
        ({"rank": 7}, r"rank is 7, but model.narrow \(12, 6\) allows at most 6"),
        ({"rank": 0}, "rank is 0, expected a whole number of at least 1"),
        ({"rank": 2.0}, "rank is 2.0, expected a whole number"),
        ({"rank": 2, "alpha": 0}, "alpha is 0, expected a positive number"),
        ({"rank": 2, "alpha": float("nan")}, "alpha is nan"),
        ({"adapter_type": "doras"}, "adapter_type is 'doras', expected one of lora, dora, dora-rows, .*, bora-xs"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line_and_changes_nothing(settings, message):
    tree = Tree(wide=nn.Linear(8, 12), narrow=nn.Linear(6, 12))
    with pytest.raises(ConfigError, match=message) as caught:
        attach_adapter(tree, **{"rank": 2, **settings})
    assert "\n" not in str(caught.value)
    assert type(tree.model["model"]["wide"]) is nn.Linear


def test_rank_is_limited_by_selected_layers_only():
    tree = Tree(wide=nn.Linear(8, 12), narrow=nn.Linear(6, 12))
    attach_adapter(tree, rank=8, include=["wide"])
    assert type(tree.model["model"]["narrow"]) is nn.Linear


def test_a_convolution_over_several_frames_is_refused():
    with pytest.raises(ConfigError, match="model.conv is Conv1d.*kernel size 1"):
        attach_adapter(Tree(conv=nn.Conv1d(4, 4, 3)), rank=2)


def test_patterns_that_would_fill_the_memory_are_refused_by_field():
    for patterns in (["[0-999999999]"], ["[0-99][0-99][0-99]"], ["layers.[0-99]."] * 101):
        with pytest.raises(ConfigError, match="^include: expands to more than 10000 names"):
            normalise(patterns, "include")
    assert normalise(["layers.[0-99]."] * 100, "include") is not None
