"""The launcher's DeepSpeed file: what it may not decide is refused by name, what it leaves open is filled in."""

import json
import logging

import pytest
import torch
import yaml

from sa3dist.errors import ConfigError
from sa3dist.parallel.zero_config import build, check
from sa3dist.runtime.process_group import Group
from sa3dist.training.acceleration import check_choices
from tests.helpers.golden import ROOT
from tests.helpers.trainers import make_settings

SHIPPED = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


def zero(stage=2, **more):
    return {"zero_optimization": {"stage": stage}, **more}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_files_are_accepted_and_named_by_the_shipped_launcher_files(path):
    config = json.loads(path.read_text())
    check(config)
    assert config["zero_optimization"]["stage"] == int(path.stem.removeprefix("zero"))
    launcher = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{path.stem}.yaml").read_text())
    assert launcher["deepspeed_config"]["deepspeed_config_file"] == f"configs/deepspeed/{path.name}"
    # Accelerate refuses these beside a file of DeepSpeed's own.
    assert not {"gradient_accumulation_steps", "gradient_clipping", "zero_stage", "mixed_precision"} & (
        launcher.keys() | launcher["deepspeed_config"].keys()
    )


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (zero(optimizer={"type": "Adam"}), "optimizer"),
        (zero(scheduler={"type": "WarmupLR"}), "scheduler"),
        (zero(gradient_clipping=1.0), "gradient_clipping"),
        (zero(communication_data_type="fp16"), "communication_data_type"),
        (zero(data_types={"grad_accum_dtype": "bf16"}), "data_types"),
        (zero(activation_checkpointing={"partition_activations": True}), "activation_checkpointing"),
        (zero(stage=0), "stage is 0"),
        ({"zero_optimization": True}, "stage is True"),
        ({}, "stage is None"),
    ],
)
def test_what_the_settings_decide_is_refused_by_name(config, named):
    with pytest.raises(ConfigError, match=named):
        check(config)


@pytest.mark.parametrize(
    ("section", "more", "named"),
    [
        ("", {"gradient_allreduce_op": "sum"}, "gradient_allreduce_op, a step takes the mean"),
        ("", {"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
        ("", {"prescale_gradients": True}, "prescale_gradients"),
        ("", {"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ("", {"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer"),
        ("", {"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ("", {"data_efficiency": {"enabled": True}}, "data_efficiency"),
        ("", {"elasticity": {"micro_batch_sizes": [2]}}, "elasticity"),
        ("", {"weight_quantization": {"quantized_initialization": {"num_bits": 4}}}, "weight_quantization"),
        ("zero_optimization", {"zero_quantized_gradients": True}, "zero_optimization.zero_quantized_gradients"),
        ("zero_optimization", {"zero_quantized_weights": True}, "zero_optimization.zero_quantized_weights"),
        ("zero_optimization", {"memory_efficient_linear": True}, "zero_optimization.memory_efficient_linear"),
        ("zero_optimization", {"leaf_module": {"classes": ["Block"]}}, "zero_optimization.leaf_module"),
        ("zero_optimization", {"stage3_module_granularity_threshold": 9}, "stage3_module_granularity_threshold"),
        ("zero_optimization", {"zenflow": {"topk_ratio": 0.1}}, "zero_optimization.zenflow"),
        ("zero_optimization", {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio"),
        ("zero_optimization", {"offload_optimizer": {"super_offload": True}}, "offload_optimizer.super_offload"),
    ],
)
def test_what_could_change_a_result_is_refused_by_name(section, more, named):
    config = zero()
    (config[section] if section else config).update(more)
    with pytest.raises(ConfigError, match=f"^ds_config: remove .*{named}"):
        check(config)


def test_a_file_that_says_what_holds_anyway_or_switches_off_what_is_not_used_is_accepted():
    config = zero(gradient_clipping=0, prescale_gradients=False, elasticity={"enabled": False}, data_efficiency={})
    config |= {"amp": {"enabled": False}, "bfloat16": {"enabled": False}, "gradient_allreduce_op": None}
    config["zero_optimization"] |= {"zero_quantized_weights": False, "offload_optimizer": {"device": "cpu", "ratio": 1}}
    check(config)
    built = build(config, 1, 1, 1, "none")
    # Some versions of DeepSpeed refuse these even where they are switched off.
    assert not {"amp", "bfloat16", "elasticity", "data_efficiency"} & built.keys()
    assert built["gradient_allreduce_op"] == "mean"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("section", ["fp16", "bf16", "bfloat16", "amp", "torch_autocast"])
def test_no_default_of_the_installed_deepspeed_and_no_half_precision_decides_a_result(stage, section):
    found = pytest.importorskip("deepspeed.runtime.config")
    config = zero(stage, **{section: {"enabled": True}})
    check(config)
    read = found.DeepSpeedConfig(build(config, micro_batch=1, accumulation=1, world_size=1, compression="none"))
    assert read.gradient_clipping == 0
    assert (read.gradient_predivide_factor, read.prescale_gradients) == (1, False)
    assert getattr(read, "gradient_allreduce_op", "mean") == "mean"
    assert read.communication_data_type == torch.float32
    assert read.grad_accum_dtype is None
    zero_found = read.zero_config
    assert not any(
        (
            read.float16_config.enabled,
            read.bfloat16_config.enabled,
            read.torch_autocast_enabled,
            read.weight_quantization_config,
            read.zero_force_ds_cpu_optimizer,
            zero_found.zenflow,
            zero_found.zero_quantized_weights,
            zero_found.zero_quantized_gradients,
            zero_found.zero_quantized_nontrainable_weights,
            zero_found.memory_efficient_linear,
        )
    )


def test_half_precision_is_turned_off_and_said(caplog):
    config = zero(bf16={"enabled": True}, fp16={"enabled": "auto"})
    with caplog.at_level(logging.WARNING):
        check(config)
    assert "bf16.enabled is turned off" in caplog.text
    assert "fp16" not in caplog.text
    built = build(config, micro_batch=1, accumulation=1, world_size=2, compression="none")
    assert built["bf16"] == built["fp16"] == {"enabled": False}
    assert built["communication_data_type"] == "fp32"


def test_batch_sizes_are_the_runs_and_another_one_is_refused():
    config = zero(train_micro_batch_size_per_gpu="auto", train_batch_size="auto", gradient_accumulation_steps=1)
    built = build(config, micro_batch=2, accumulation=3, world_size=4, compression="bf16")
    assert built["train_micro_batch_size_per_gpu"] == 2
    assert built["gradient_accumulation_steps"] == 3
    assert built["train_batch_size"] == 24
    assert built["communication_data_type"] == "bf16"
    with pytest.raises(ConfigError, match=r"train_batch_size is 16, this run's is 24"):
        build(zero(train_batch_size=16), micro_batch=2, accumulation=3, world_size=4, compression="none")


def test_values_left_to_the_launcher_are_left_to_deepspeed():
    built = build(
        zero(reduce="auto") | {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, 1, 1, 1, "none"
    )
    assert built["zero_optimization"]["stage"] == 1
    assert "reduce_bucket_size" not in built["zero_optimization"]
    assert "reduce" not in built


@pytest.mark.parametrize(
    ("said", "used"), [({}, 0), ({"stage3_max_reuse_distance": "auto"}, 0), ({"stage3_max_reuse_distance": 7}, 7)]
)
def test_nothing_stays_gathered_for_its_next_use_unless_the_file_says_so(said, used):
    built = build({"zero_optimization": {"stage": 3, **said}}, 1, 1, 2, "none")["zero_optimization"]
    assert built["stage3_max_reuse_distance"] == used


def test_gradients_are_given_in_the_order_of_the_tensors_whatever_a_file_says_and_older_deepspeed_reads_it():
    asked = {"round_robin_gradients": True, "parameter_alignment": True, "ignore_unused_parameters": False}
    for zero_options in ({}, asked):
        built = build({"zero_optimization": {"stage": 2, **zero_options}}, 1, 1, 1, "none")["zero_optimization"]
        assert (built["round_robin_gradients"], built["ignore_unused_parameters"]) == (False, True)
        assert "parameter_alignment" not in built


@pytest.mark.parametrize("words", [{"adapter_products": "formed"}, {"cuda_graphs": "on"}])
def test_what_a_divided_base_cannot_do_is_refused_by_name(words):
    groups = {stage: Group(0, 2, torch.device("cuda"), {"zero_optimization": {"stage": stage}}) for stage in (2, 3)}
    check_choices(make_settings(**words), groups[2])
    with pytest.raises(ConfigError, match=f"{next(iter(words))}.*ZeRO-3"):
        check_choices(make_settings(**words), groups[3])
