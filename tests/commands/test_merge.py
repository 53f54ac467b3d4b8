"""Merging: what is written equals the weighted sum of the effective changes; what cannot be added up is refused."""

import json
import re
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sa3dist import cli
from sa3dist.adapters import detach_adapter, load_adapter, read_adapter_file
from sa3dist.model.checkpoint import CheckpointFile
from sa3dist.model.rewrite_safetensors import rewrite_checkpoint
from tests.helpers.adapter_files import base_key, changes, load, make_adapter, relative, velocity_of

BLOCK_0 = ["layers.0."]


@pytest.fixture
def base(demo_base):
    return load(demo_base)


def merge(*words) -> int:
    return cli.main(["merge", *map(str, words)])


def summed(demo_base, *weighted):
    total = {}
    for path, weight in weighted:
        for layer, change in changes(demo_base, path).items():
            total[layer] = total.get(layer, 0) + weight * change
    return total


def test_merged_loras_add_up_their_changes(base, demo_base, tmp_path):
    one = make_adapter(base, tmp_path / "one.safetensors", 1, adapter_type="lora", rank=3, alpha=5)
    two = make_adapter(base, tmp_path / "two.safetensors", 2, adapter_type="lora", rank=4, include=BLOCK_0)
    assert merge(f"{one}=0.7", f"{two}=-0.3", "--output", tmp_path / "both.safetensors") == 0
    merged = read_adapter_file(tmp_path / "both.safetensors")
    assert (merged.config.rank, merged.config.adapter_type) == (7, "lora")
    expected, found = summed(demo_base, (one, 0.7), (two, -0.3)), changes(demo_base, merged.path)
    assert found.keys() == expected.keys()
    # The factors' float16 rounding: 2^-11 of every product.
    assert max(relative(found[layer], expected[layer]) for layer in expected) < 5e-4
    # Its own lists select what it holds, so that a strict loader accepts it.
    load_adapter(base, merged.path)


def test_loras_of_one_scale_are_merged_without_any_rounding(base, demo_base, tmp_path):
    paths = [
        make_adapter(base, tmp_path / f"{seed}.safetensors", seed, adapter_type="lora", rank=4, alpha=3)
        for seed in (1, 2)
    ]
    assert merge(*(f"{path}=0.5" for path in paths), "--output", tmp_path / "mean.safetensors") == 0
    expected, found = (
        summed(demo_base, *((path, 0.5) for path in paths)),
        changes(demo_base, tmp_path / "mean.safetensors"),
    )
    assert max(relative(found[layer], expected[layer]) for layer in expected) < 1e-14


def test_merged_cores_give_the_sum_of_the_updates(base, tmp_path):
    small = make_adapter(base, tmp_path / "s.safetensors", 1, adapter_type="lora-xs", rank=3, include=BLOCK_0)
    large = make_adapter(base, tmp_path / "l.safetensors", 2, adapter_type="lora-xs", rank=5, alpha=2, include=BLOCK_0)
    assert merge(f"{small}=2", f"{large}=0.5", "--output", tmp_path / "m.safetensors") == 0
    layer = "model.transformer.layers.0.self_attn.to_qkv"
    before = base.fp32_weight(layer).double()
    found = {}
    for path in (small, large, tmp_path / "m.safetensors"):
        load_adapter(base, path)
        found[path] = base.get_submodule(f"model.{layer}").effective_weight(base.fp32_weight(layer)).double() - before
        detach_adapter(base)
    expected = 2 * found[small] + 0.5 * found[large]
    assert relative(found[tmp_path / "m.safetensors"], expected) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_base_holds_the_sum_of_the_effective_changes_and_nothing_else_differs(
    base, demo_base, tmp_path, dtype
):
    rows = make_adapter(base, tmp_path / "rows.safetensors", 1, adapter_type="dora-rows", rank=4)
    cols = make_adapter(base, tmp_path / "cols.safetensors", 2, adapter_type="dora-cols", rank=3, include=BLOCK_0)
    both = make_adapter(base, tmp_path / "both.safetensors", 3, adapter_type="bora", rank=2, include=BLOCK_0)
    source = tmp_path / "base"
    source.mkdir()
    (source / "model_config.json").write_bytes((demo_base / "model_config.json").read_bytes())
    tensors = load_file(demo_base / "model.safetensors")
    save_file({key: value.to(dtype) for key, value in tensors.items()}, source / "model.safetensors")
    weighted = (rows, 1.0), (cols, 0.5), (both, -0.25)
    words = [f"{path}={weight}" for path, weight in weighted]
    assert merge(*words, "--base", source, "--output", tmp_path / "merged") == 0
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "merged"))
    assert {key: value.dtype for key, value in before.items()} == {key: value.dtype for key, value in after.items()}
    expected = {base_key(layer): change for layer, change in summed(source, *weighted).items()}
    assert len(expected) == 31
    for key, value in before.items():
        if key not in expected:
            assert torch.equal(after[key], value)
        else:
            wanted = value.double() + expected[key].view(value.shape)
            torch.testing.assert_close(after[key].double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)
    load(tmp_path / "merged")


def test_a_merged_base_answers_as_the_adapted_one(base, demo_base, tmp_path):
    path = make_adapter(base, tmp_path / "a.safetensors", 1, adapter_type="bora-xs", rank=4)
    assert merge(path, "--base", demo_base, "--output", tmp_path / "merged") == 0
    merged = load(tmp_path / "merged")
    # The text encoder came along, for it lay inside.
    assert merged.text_encoder_digest() == base.text_encoder_digest()
    load_adapter(base, path)
    torch.testing.assert_close(velocity_of(merged), velocity_of(base), rtol=1e-4, atol=1e-4)
    with safe_open(tmp_path / "merged/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["merged_from"])[0]["lora_config"]["adapter_type"] == "bora-xs"


def test_an_approximation_states_its_error_and_is_exact_at_full_rank(base, demo_base, tmp_path, capsys):
    layer = ["layers.0.self_attn.to_out"]
    rows = make_adapter(base, tmp_path / "rows.safetensors", 1, adapter_type="dora-rows", rank=4, include=layer)
    expected = changes(demo_base, rows)
    errors = {}
    for rank in (8, 128):
        target = tmp_path / f"{rank}.safetensors"
        assert merge(rows, "--base", demo_base, "--svd", rank, "--output", target) == 0
        (found,) = changes(demo_base, target).values()
        (wanted,) = expected.values()
        errors[rank] = relative(found, wanted)
        printed = re.findall(r"relative error (\d\S+)", capsys.readouterr().out)
        stated = [*printed, read_adapter_file(target).metadata["svd_largest_relative_error"]]
        assert [float(error) for error in stated] == pytest.approx(2 * [errors[rank]], rel=1e-2)
    # No matrix of rank 8 is nearer than the truncated decomposition.
    tail = torch.linalg.svdvals(next(iter(expected.values())))
    assert errors[8] == pytest.approx((tail[8:].norm() / tail.norm()).item(), rel=1e-3)
    assert errors[128] < 1e-3


def test_rewriting_holds_one_tensor_at_a_time(demo_base, tmp_path, monkeypatch):
    source = demo_base / "model.safetensors"
    alive: list[weakref.ref] = []
    most = 0

    def made(key, shape):
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        value = torch.full(shape, 2.0)
        alive.append(weakref.ref(value))
        return value

    shapes = {key: shape for key, shape in CheckpointFile(source).shapes.items() if key.endswith(".weight")}
    changed = {key: (lambda key=key, shape=shape: made(key, shape)) for key, shape in shapes.items()}
    rewrite_checkpoint(source, tmp_path / "out.safetensors", changed, {})
    assert len(alive) == len(shapes) > 31
    # The one just written may still be named by the writer.
    assert most <= 1
    assert {float(value.min()) for key, value in load_file(tmp_path / "out.safetensors").items() if key in shapes} == {
        2.0
    }


@pytest.fixture(scope="module")
def wrong_files(demo_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    base = load(demo_base)
    make_adapter(base, folder / "rows.safetensors", 1, adapter_type="dora-rows", rank=2, include=BLOCK_0)
    lora = make_adapter(base, folder / "lora.safetensors", 1, adapter_type="lora", rank=2, include=BLOCK_0)
    make_adapter(base, folder / "wide.safetensors", 1, adapter_type="lora", rank=40, include=BLOCK_0)
    tensors = load_file(lora)
    with safe_open(lora, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, folder / "other.safetensors", {**metadata, "base_sha256": "another"})
    tensors.popitem()
    save_file(tensors, folder / "damaged.safetensors", metadata)
    (folder / "existing").mkdir()
    return folder


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rows.safetensors", "lora.safetensors"], "cannot be added up exactly"),
        (["lora.safetensors=much"], "'much' is not a number"),
        (["lora.safetensors=nan"], "'nan' is not a number up to 1000000"),
        (["lora.safetensors=-1e7"], "'-1e7' is not a number up to 1000000"),
        (["missing.safetensors"], "cannot be read (No such file or directory)"),
        (["lora.safetensors", "--svd", "4"], "--svd: needs"),
        (["lora.safetensors", "--base", "nowhere"], "no such directory"),
        (["wide.safetensors", "wide.safetensors"], "the ranks add up to 80, but"),
        (["other.safetensors", "lora.safetensors"], "were trained on different bases"),
        (["lora.safetensors", "--base", "BASE", "--svd", "200"], "svd: 200 is too large"),
        (["lora.safetensors", "--base", "BASE", "--output", "existing"], "exists already"),
        (["damaged.safetensors"], "holds"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line_and_nothing_is_written(
    demo_base, wrong_files, monkeypatch, capsys, words, expected
):
    monkeypatch.chdir(wrong_files)
    before = sorted(wrong_files.rglob("*"))
    words = [str(demo_base) if word == "BASE" else word for word in words]
    assert merge("--output", "out", *words) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert len(message.strip().splitlines()) == 1
    assert sorted(wrong_files.rglob("*")) == before
