"""The settings tree: the endpoint's fields, their ranges, the traps of YAML, and what users are told."""

import json
import typing

import pytest
import yaml
from sa3dist_kernels import ADAPTER_TYPES

from sa3dist import config
from sa3dist.errors import ConfigError
from sa3dist.request.fields import AdapterName

# Source: spec/training.md 3, the endpoint's columns.
ENDPOINT_DEFAULTS = {
    "model": "medium-base",
    "number_of_steps": 1000,
    "learning_rate": 1e-4,
    "rank": 16,
    "adapter_type": "dora-rows",
    "duration": None,
    "batch_size": 1,
    "seed": 42,
    "base_precision": "bf16",
    "include": None,
    "exclude": None,
    "lora_checkpoint_url": None,
    "pre_encode": False,
}


def build(**values):
    return config.build({"audio_data_url": "clips.zip", **values})


def test_the_adapter_types_are_those_of_the_kernels():
    assert typing.get_args(AdapterName) == tuple(ADAPTER_TYPES)


def test_endpoint_fields_have_the_endpoints_defaults():
    resolved = build().as_dict()
    assert {key: resolved[key] for key in ENDPOINT_DEFAULTS} == ENDPOINT_DEFAULTS


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [
        ("number_of_steps", 1, 20000),
        ("rank", 1, 256),
        ("duration", 1, 380),
        ("batch_size", 1, 8),
        ("seed", 0, 2147483647),
    ],
)
def test_ranges_hold_at_both_ends_and_are_said_beyond_them(field, low, high):
    assert getattr(build(**{field: low}), field) == low
    assert getattr(build(**{field: high}), field) == high
    for value in (low - 1, high + 1):
        with pytest.raises(ConfigError, match=rf"^{field}: {value} is not valid, expected .*{low}\.\.{high}$"):
            build(**{field: value})


@pytest.mark.parametrize("value", [0, -1e-4, float("nan"), float("inf"), "fast"])
def test_the_learning_rate_is_a_finite_number_above_zero(value):
    with pytest.raises(ConfigError, match="^learning_rate: .* expected a finite number above 0"):
        build(learning_rate=value)


@pytest.mark.parametrize(
    ("given", "kept"), [("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16"), ("float16", "fp16"), ("fp32", "fp32")]
)
def test_base_precision_takes_the_endpoints_aliases(given, kept):
    assert build(base_precision=given).base_precision == kept


@pytest.mark.parametrize("kind", ["lora-xs", "dora-rows-xs", "dora-cols-xs", "bora-xs"])
def test_xs_types_take_ranks_up_to_17(kind):
    assert build(adapter_type=kind, rank=17).rank == 17
    with pytest.raises(ConfigError, match=rf"^rank: 18 is out of range for {kind}, expected 1\.\.17"):
        build(adapter_type=kind, rank=18)


def test_a_float16_base_without_autocast_is_refused():
    with pytest.raises(ConfigError, match="^mixed_precision: no loses gradients"):
        build(base_precision="fp16", mixed_precision="no")


def test_an_unknown_type_is_answered_with_all_nine():
    with pytest.raises(ConfigError) as caught:
        build(adapter_type="dorra")
    for name in [
        "lora",
        "dora",
        "dora-rows",
        "dora-cols",
        "bora",
        "lora-xs",
        "dora-rows-xs",
        "dora-cols-xs",
        "bora-xs",
    ]:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("learning_rte", "learning_rate"),
        ("steps", "number_of_steps"),
        ("adapter", "adapter_type"),
        ("lr", "learning_rate"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(wrong, right):
    with pytest.raises(ConfigError, match=f"^{wrong}: unknown key, did you mean {right}\\?$"):
        build(**{wrong: 1})


def test_all_wrong_fields_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        build(rank=0, batch_size=9, sead=1)
    assert sorted(line.split(":")[0] for line in str(caught.value).splitlines()) == ["batch_size", "rank", "sead"]


def test_the_data_is_required():
    with pytest.raises(ConfigError, match="^audio_data_url: missing"):
        config.build({})


@pytest.mark.parametrize("empty", [[], None])
def test_an_empty_pattern_list_means_unset(empty):
    assert build(include=empty, exclude=empty).include is None


@pytest.mark.parametrize(
    "key",
    [
        "gradient_accumulation_steps",
        "global_batch_size",
        "shuffle_buffer",
        "bucket_batches",
        "preview_steps",
        "preview_cfg",
    ],
)
def test_a_number_that_no_run_needs_and_that_would_not_end_is_refused_with_its_range(key):
    for value in ("99999999999999", "-99999999999999"):
        merged = config.read_arguments(["audio_data_url=x.zip", f"{key}={value}"])
        with pytest.raises(
            ConfigError, match=rf"^{key}: {value}(\.0)? is not valid, expected a (whole )?number, .*\.\."
        ):
            config.build(merged)


@pytest.mark.parametrize("value", [True, False])
def test_a_boolean_is_no_number(value):
    with pytest.raises(ConfigError, match="^rank: .* is not a number"):
        build(rank=value)


def test_yaml_words_that_look_like_booleans_are_read_as_words(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("audio_data_url: x.zip\nmixed_precision: no\ngradient_checkpointing: on\n")
    settings = config.build(config.read_arguments([str(path)]))
    assert (settings.mixed_precision, settings.gradient_checkpointing) == ("no", "on")
    settings = config.build(config.read_arguments([str(path), "gradient_checkpointing=off"]))
    assert settings.gradient_checkpointing == "off"


def test_later_words_win_and_a_request_is_a_config(tmp_path):
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"audio_data_url": "a.zip", "rank": 8, "include": ["layers.[0-3]."]}))
    merged = config.read_arguments([str(request), "rank=4", "learning_rate=1e-3", "exclude=[ff, cross]", "name=2024"])
    settings = config.build(merged)
    assert (settings.rank, settings.learning_rate, settings.name) == (4, 1e-3, "2024")
    assert (settings.include, settings.exclude) == (["layers.[0-3]."], ["ff", "cross"])


def test_a_value_that_is_no_yaml_is_taken_as_text():
    merged = config.read_arguments(["audio_data_url=s3://bucket/shard-{000000..000127}.tar"])
    assert merged["audio_data_url"] == "s3://bucket/shard-{000000..000127}.tar"


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.yaml", "? [a, b]\n: 3", "not valid YAML"),
        ("a.yaml", "- 1", "holds a list"),
        ("a.yaml", "rank: 3\nseed: 1\nrank: 4\n", "rank: given more than once; keep one"),
        ("a.json", '{"rank": 3, "rank": 4}', "rank: given more than once; keep one"),
        ("a.yaml", None, "cannot read"),
    ],
)
def test_an_unreadable_config_file_is_named(tmp_path, name, text, match):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=match) as caught:
        config.read_arguments([str(path)])
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_the_resolved_tree_survives_a_round_trip_through_yaml():
    settings = build(include=["a"], mixed_precision="no", gradient_checkpointing="on", duration=12.5)
    again = config.build(yaml.safe_load(yaml.safe_dump(settings.as_dict())))
    assert again == settings


def test_work_dir_stands_beside_the_results():
    settings = build(output_dir="/data/runs/one")
    assert str(settings.work_dir) == "/data/runs/sa3dist-work"
    assert str(build(name="drums").output_dir) == "runs/drums"


def test_help_tells_every_key_with_its_default():
    text = config.help_text()
    for field, info in config.Settings.model_fields.items():
        assert f"\n  {field}\n" in f"\n{text}"
        assert info.description in text
    assert "1..20000; default 1000" in text
    assert "(seconds, H:MM:SS or D-H:MM:SS above 0, at most 31536000; default unset)" in text
    assert "(a list of text, a number, text; default 0.0)" in text
    assert "(true or false; default false)" in text


@pytest.mark.parametrize("key", ["learning_rate", "alpha", "context_weight", "weight_decay"])
def test_what_float32_cannot_hold_is_refused_ahead_of_the_step_that_would_fail(key):
    with pytest.raises(ConfigError, match=f"^{key}: 1e\\+39 is more than float32 holds"):
        build(**{key: 1e39})


@pytest.mark.parametrize(("key", "value"), [("step_timeout", 1e12), ("max_wall_time", 1e12), ("num_workers", 10**9)])
def test_what_no_clock_and_no_machine_reaches_is_refused(key, value):
    with pytest.raises(ConfigError, match=f"^{key}: {value} is not valid, expected"):
        build(**{key: value})


def test_a_key_that_is_no_word_and_a_setting_without_its_value_are_named():
    with pytest.raises(ConfigError, match="^config: None is no key"):
        config.build({None: 3})
    with pytest.raises(ConfigError, match="^rank: cannot read this config file .*; a setting is given as rank=...$"):
        config.read_arguments(["rank", "8"])
    with pytest.raises(ConfigError, match="^'': cannot read this config file"):
        config.read_arguments([""])


def test_a_data_set_given_without_its_key_is_told_where_it_belongs(tmp_path):
    path = tmp_path / "clips.zip"
    path.write_bytes(b"PK\x03\x04\xff\xfe")
    for given in (path, tmp_path):
        with pytest.raises(ConfigError, match=f"^{given}: .*a data set is given as audio_data_url=...$"):
            config.read_arguments([str(given)])


def test_the_global_batch_derives_the_accumulation():
    assert build(batch_size=2, global_batch_size=16).accumulation(world_size=4) == 2
    with pytest.raises(ConfigError, match="^global_batch_size: 10 is not a multiple of .* 2 x 4"):
        build(batch_size=2, global_batch_size=10).accumulation(world_size=4)
    assert build(global_batch_size=8, gradient_accumulation_steps=4).accumulation(world_size=2) == 4
    with pytest.raises(ConfigError, match="^gradient_accumulation_steps: 7, but global_batch_size 8 makes it 4 here"):
        build(global_batch_size=8, gradient_accumulation_steps=7).accumulation(world_size=2)


def test_an_unreadable_config_file_leaves_the_other_words_known(tmp_path):
    merged: dict = {}
    with pytest.raises(ConfigError, match="absent.yaml"):
        config.read_arguments([str(tmp_path / "absent.yaml"), f"output_dir={tmp_path}/run"], merged)
    assert config.output_dir_of(merged) == tmp_path / "run"
