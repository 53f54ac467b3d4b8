"""Adapter files: recorded ones are read and written again the same; wrong ones are refused in one line."""

import json

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

import sa3dist
from sa3dist.adapters import (
    adapted_layers,
    adapter_parameters,
    attach_adapter,
    effective_weight,
    load_adapter,
    lora_config,
    save_adapter,
    warm_start,
)
from sa3dist.adapters.file import read_adapter_file
from sa3dist.errors import CheckpointError, ConfigError, EnvironmentFailure
from tests.helpers.adapter_base import RecordedBase, adapter_digest, forward_inputs, move
from tests.helpers.golden import golden

ROWS, XS = (golden(f"adapters/lora_tiny_{name}.safetensors") for name in ("dora_rows", "bora_xs"))


@pytest.fixture
def base():
    return RecordedBase()


def header(path):
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


def rewritten(path, target, change, **config):
    """A copy with its tensors passed through ``change`` and fields of its config replaced; None removes one."""
    value = {**json.loads(header(path)["lora_config"]), **config}
    metadata = {"lora_config": json.dumps({key: field for key, field in value.items() if field is not None})}
    save_file({key: tensor.contiguous() for key, tensor in change(load_file(path)).items()}, target, metadata)
    return target


@pytest.mark.parametrize("name", ["dora_rows", "bora_xs"])
def test_recorded_files_give_the_effective_weights_the_reference_sees(base, name):
    load_adapter(base, golden(f"adapters/lora_tiny_{name}.safetensors"))
    recorded = load_file(golden(f"adapters/effective_tiny_{name}.safetensors"))
    weights = [key for key in recorded if key.endswith(".weight")]
    assert weights
    for key in weights:
        layer = key.split(".", 1)[1].removesuffix(".weight")
        expected = recorded[key]
        # With the bases of a float32 SVD, which were not recorded, 1.4e-6 on every machine.
        assert (effective_weight(base, layer) - expected).norm() < 1e-5 * expected.norm()


def test_the_recorded_forward_of_the_adapted_model_is_met(base):
    load_adapter(base, ROWS)
    recorded = load_file(golden("adapters/effective_tiny_dora_rows.safetensors"))
    y = base(recorded["forward.x"], recorded["forward.t"], recorded["forward.inpaint_mask"])
    torch.testing.assert_close(y, recorded["forward.y"], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("path", [ROWS, XS], ids=["dora-rows", "bora-xs"])
def test_a_recorded_file_written_again_has_the_same_keys_values_and_header(base, path, tmp_path):
    load_adapter(base, path)
    save_adapter(base, tmp_path / "again.safetensors")
    old, new = load_file(path), load_file(tmp_path / "again.safetensors")
    assert old.keys() == new.keys()
    assert all(new[key].dtype == torch.float16 and torch.equal(new[key], old[key]) for key in old)
    assert header(tmp_path / "again.safetensors") == header(path)


@pytest.mark.parametrize(("name", "adapter_type"), [("dora_rows", "dora-rows"), ("bora_xs", "bora-xs")])
def test_files_of_the_whole_tiny_model_fit_key_by_key(name, adapter_type, tmp_path):
    base = sa3dist.load_base(golden("tiny-sa3"), encoder=False)
    path = golden(f"training/tiny_sa3_lora_{name}.safetensors")
    load_adapter(base, path)
    assert lora_config(base)["adapter_type"] == adapter_type
    assert any(key.startswith("conditioners.prompt.proj_out.") for key in adapter_parameters(base))
    save_adapter(base, tmp_path / "again.safetensors")
    old, new = load_file(path), load_file(tmp_path / "again.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(new[key], old[key]) for key in old)


def test_equal_adapters_give_equal_bytes_and_extra_metadata_is_kept_as_strings(base, tmp_path):
    attach_adapter(base, "bora", rank=3, alpha=1.5, include=["layers.[0-1].ff"])
    move(base)
    metadata = {f"key{i}": f"value {i}" for i in range(8)} | {"step": 12, "base_sha256": "recorded"}
    save_adapter(base, tmp_path / "a.safetensors", metadata)
    save_adapter(base, tmp_path / "b.safetensors", dict(reversed(metadata.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = header(tmp_path / "a.safetensors")
    assert found["step"] == "12"
    assert found["key3"] == "value 3"
    assert found["lora_config"] == (
        '{"rank": 3, "alpha": 1.5, "adapter_type": "bora", "dropout": 0.0, '
        '"include": ["layers.[0-1].ff"], "exclude": null}'
    )
    assert len(read_adapter_file(tmp_path / "a.safetensors").layers()) == 4


def test_loading_again_replaces_values_of_an_agreeing_adapter_only(base, tmp_path):
    attach_adapter(base, rank=8)
    load_adapter(base, ROWS, strength=0.5)
    fresh = RecordedBase()
    load_adapter(fresh, ROWS)
    assert adapter_digest(base) == adapter_digest(fresh)
    assert all(layer.strength == 0.5 for layer in adapted_layers(base).values())
    with pytest.raises(
        CheckpointError, match="adapter_type is 'bora-xs' in the file, 'dora-rows' in the attached adapter"
    ):
        load_adapter(base, XS)
    assert adapter_digest(base) == adapter_digest(fresh)


def test_files_without_config_are_plain_lora_with_alpha_equal_to_rank(base, tmp_path):
    attach_adapter(base, "lora", rank=5)
    move(base)
    save_adapter(base, tmp_path / "full.safetensors")
    save_file(load_file(tmp_path / "full.safetensors"), tmp_path / "bare.safetensors")
    other = RecordedBase()
    load_adapter(other, tmp_path / "bare.safetensors")
    assert lora_config(other) == lora_config(base)


@pytest.mark.parametrize(
    ("shape", "resolved"), [((1, -1), "dora-cols"), ((-1, 1), "dora"), ((-1,), "dora")], ids=["cols", "rows", "1-D"]
)
def test_dora_files_are_resolved_by_the_shape_of_their_first_magnitude(base, shape, resolved, tmp_path):
    attach_adapter(base, "dora-cols" if resolved == "dora-cols" else "dora-rows", rank=4, include=["to_qkv"])
    move(base)
    save_adapter(base, tmp_path / "new.safetensors")

    def legacy(tensors):
        return {key: value.view(shape) if key.endswith("magnitude") else value for key, value in tensors.items()}

    path = rewritten(tmp_path / "new.safetensors", tmp_path / "old.safetensors", legacy, adapter_type="dora")
    other = RecordedBase()
    load_adapter(other, path)
    assert lora_config(other)["adapter_type"] == resolved
    for name in adapted_layers(base):
        torch.testing.assert_close(effective_weight(other, name), effective_weight(base, name), rtol=2e-3, atol=2e-3)


FIRST = "conditioners.seconds_total.embedder.embedding.1.parametrizations.weight.0"


def without(*endings):
    return lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(endings)}


def with_value(value):
    def change(tensors):
        tensors[f"{FIRST}.lora_B"][0, 0] = value
        return tensors

    return change


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            without("to_qkv.parametrizations.weight.0.lora_B"),
            {},
            r"93 tensors .* 2 missing \(model.*layers.0.*to_qkv.*lora_B",
        ),
        (without("magnitude"), {}, r"31 missing \(.*, .*, .*, \.\.\.\)"),
        (lambda t: {**t, "model.odd.weight": torch.ones(2)}, {}, r"1 unexpected \(model.odd.weight\)"),
        (
            lambda t: {**t, f"{FIRST}.lora_A": torch.ones(8, 9)},
            {},
            r"1 of the wrong shape .*lora_A is \[8, 9\], expected \[8, 256\]",
        ),
        (without(), {"rank": 4}, "62 of the wrong shape"),
        (without(), {"adapter_type": "bora"}, "62 missing .* 31 unexpected"),
        (without(), {"adapter_type": "dorra"}, "lora_config in the header is not valid: adapter_type is 'dorra'"),
        (without(), {"rank": "8"}, "not valid: rank is '8'"),
        (without(), {"alpha": "x"}, "not valid: alpha is 'x'"),
        (without(), {"include": ["nothing"]}, "select no layer of this base"),
        (with_value(float("nan")), {}, r"lora_B \(torch.float16\) holds values that are not finite"),
        (with_value(float("inf")), {}, "not finite"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line_and_changes_nothing(base, change, config, message, tmp_path):
    path = rewritten(ROWS, tmp_path / "wrong.safetensors", change, **config)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_adapter(base, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not adapted_layers(base)


def test_what_is_no_safetensors_file_is_refused(base, tmp_path):
    (tmp_path / "text.safetensors").write_text("not a tensor in sight")
    (tmp_path / "cut.safetensors").write_bytes(ROWS.read_bytes()[:5000])
    reasons = {"text": "not a readable safetensors file", "cut": "is cut off: 5000 of", "absent": "cannot be read"}
    for name, reason in reasons.items():
        with pytest.raises(CheckpointError, match=f"{name}.safetensors: {reason}"):
            load_adapter(base, tmp_path / f"{name}.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no lora_A or M_xs tensor .* is this an adapter file"):
        load_adapter(base, tmp_path / "other.safetensors")


def test_warm_start_copies_values_of_an_agreeing_file(base):
    attach_adapter(base, rank=8)
    warm_start(base, ROWS)
    recorded = load_file(ROWS)
    assert all(torch.equal(value.half(), recorded[key]) for key, value in adapter_parameters(base).items())
    base(*forward_inputs(base)).sum().backward()
    assert all(value.grad is not None for value in adapter_parameters(base).values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter_type": "lora"}, "adapter_type is 'dora-rows' in the file, 'lora' in the attached"),
        ({"rank": 4}, "rank is 8 in the file, 4 in the attached"),
        ({"alpha": 16}, "alpha is 8 in the file, 16 in the attached"),
        ({"include": ["ff"]}, r"include is None in the file, \('ff',\) in the attached"),
        ({"exclude": ["ff"]}, r"exclude is None in the file, \('ff',\) in the attached"),
    ],
)
def test_warm_start_refuses_a_file_of_another_configuration(base, settings, message):
    attach_adapter(base, **{"rank": 8, **settings})
    before = adapter_digest(base)
    with pytest.raises(CheckpointError, match=message):
        warm_start(base, ROWS)
    assert adapter_digest(base) == before


def test_warm_start_refuses_a_file_trained_on_another_base(base, tmp_path):
    attach_adapter(base, "dora", rank=4)
    save_adapter(base, tmp_path / "same.safetensors", {"base_sha256": base.weights_digest()})
    save_adapter(base, tmp_path / "other.safetensors", {"base_sha256": "0123"})
    warm_start(base, tmp_path / "same.safetensors")
    with pytest.raises(CheckpointError, match="base_sha256 is 0123, this base has recorded"):
        warm_start(base, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="needs an attached adapter"):
        warm_start(RecordedBase(), ROWS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70000.0])
def test_a_value_float16_cannot_hold_is_never_published(base, value, tmp_path):
    attach_adapter(base, rank=4)
    save_adapter(base, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    with torch.no_grad():
        list(adapter_parameters(base).values())[3][0] = value
    with pytest.raises(EnvironmentFailure, match="model.to_timestep_embed.2.*lora_A holds .* not saved"):
        save_adapter(base, tmp_path / "good.safetensors")
    assert (tmp_path / "good.safetensors").read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["good.safetensors"]


def test_an_empty_tensor_is_never_published(base, tmp_path):
    attach_adapter(base, rank=4)
    list(adapter_parameters(base).values())[0].data = torch.empty(0)
    with pytest.raises(EnvironmentFailure, match="is empty: its values are on another process"):
        save_adapter(base, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_saving_without_an_adapter_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="no adapter to save"):
        save_adapter(base, tmp_path / "x.safetensors")


def test_a_strength_that_is_no_number_is_refused_before_anything_is_attached():
    base = RecordedBase()
    with pytest.raises(ConfigError, match="strength is nan"):
        load_adapter(base, golden("adapters/lora_tiny_dora_rows.safetensors"), strength=float("nan"))
    assert adapted_layers(base) == {}
