"""The launcher's DeepSpeed configuration: checked against the run's settings and completed for the engine.

The file says how memory is divided. Batch sizes, optimiser, schedule and precision are the run's settings: the file
leaves them out or says "auto". Anything else is refused, except that 16-bit training is just turned off.
"""

import logging
from typing import Any

from sa3dist.errors import ConfigError

log = logging.getLogger(__name__)

# Sections that would hold adapters, gradients or moments in 16 bits, or autocast a second time.
HALF_PRECISION = ("fp16", "bf16", "bfloat16", "amp", "torch_autocast")
# Keys decided by the run's settings instead.
OURS = {
    "optimizer": "AdamW is set by learning_rate and weight_decay",
    "scheduler": "the learning rate is set by learning_rate and its schedule",
    "communication_data_type": "it is set by gradient_compression",
    "data_types": "gradients are float32",
    "activation_checkpointing": "it is set by gradient_checkpointing",
}
SIZES = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
# Keys that could change a result: the value of every run, whatever DeepSpeed's default, and why. A file may repeat it.
PINNED = {
    # DeepSpeed 0.19 clips at 1.0 by default.
    "gradient_clipping": (0.0, "gradients are not clipped here"),
    "gradient_allreduce_op": ("mean", "a step takes the mean over the ranks"),
    "gradient_predivide_factor": (1.0, "gradients are summed as they are and divided once"),
    "prescale_gradients": (False, "gradients are summed as they are and divided once"),
    "managed_gradient_accumulation": (True, "gradients of a step's micro batches are added up"),
    # Optimiser state on the CPU works with torch's AdamW; DeepSpeed's own would need a compiler.
    "zero_force_ds_cpu_optimizer": (False, "torch's AdamW steps in every mode"),
}
PINNED_ZERO = {
    "zero_quantized_weights": (False, "the base is not rounded on its way"),
    "zero_quantized_nontrainable_weights": (False, "the base is not rounded"),
    "zero_quantized_gradients": (False, "gradients are rounded by gradient_compression only"),
    # If on, it replaces the product of every linear layer in the process, encoders included.
    "memory_efficient_linear": (False, "linear layers compute the same in every mode"),
}
PINNED_OFFLOAD = {
    "ratio": (1.0, "DeepSpeed would step a part with an AdamW whose rate nobody sets"),
    "super_offload": (False, "torch's AdamW steps in every mode"),
}
# Keys that only say how memory is divided or what is printed; docs/parallel.md explains the rest. Keys about modules
# gathered whole are missing: DeepSpeed does not see the calls of blocks, so they cannot work.
FREE = {
    *("zero_optimization", "zero_allow_untested_optimizer", "aio", "checkpoint", "disable_python_gc", "log_level"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "timers", "comms_logger"),
    *("flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "dataloader_drop_last"),
}
FREE_ZERO = {
    *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
    *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "load_from_fp32_weights"),
    *("elastic_checkpoint", "offload_param", "offload_optimizer", "sub_group_size", "cpu_offload", "cpu_offload_param"),
    *("cpu_offload_use_pin_memory", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    *("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"),
    *("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential"),
    *("ignore_unused_parameters", "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size"),
    *("override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks"),
    "pipeline_loading_checkpoint",
}


def without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """A copy without "auto" values, so that DeepSpeed's own defaults apply to them."""
    kept = {key: without_auto(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in kept.items() if value != "auto"}


def check(config: dict[str, Any]) -> None:
    """Raises ConfigError for what contradicts the settings or could change a result. Logs what it overrides."""
    config = without_auto(config)
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else zero
    if not isinstance(zero, dict) or stage not in (1, 2, 3):
        raise ConfigError(f"ds_config: zero_optimization.stage is {stage!r}, expected 1, 2 or 3; without ZeRO use DDP")
    for section, decides in OURS.items():
        if config.get(section):
            raise ConfigError(f"ds_config: remove {section}, {decides}")
    _check_keys(config, PINNED, {*FREE, *SIZES, *OURS, *HALF_PRECISION}, "")
    _check_keys(zero, PINNED_ZERO, FREE_ZERO, "zero_optimization.")
    _check_keys(zero.get("offload_optimizer") or {}, PINNED_OFFLOAD, None, "zero_optimization.offload_optimizer.")
    for section in HALF_PRECISION:
        if _is_on(config.get(section)):
            log.warning(
                "ds_config: %s.enabled is turned off; adapters, gradients and moments are float32 in every mode, "
                "mixed_precision sets the autocast of the step",
                section,
            )


def _is_on(value: Any) -> bool:
    """Whether a section is on: by its ``enabled`` if it has one, otherwise by being there."""
    return bool(value.get("enabled", value) if isinstance(value, dict) else value)


def _check_keys(section: dict[str, Any], pinned: dict[str, tuple], free: set[str] | None, where: str) -> None:
    """free: the other keys allowed; None: all."""
    for key, value in section.items():
        if key in pinned:
            expected, why = pinned[key]
            # ``null`` asks for DeepSpeed's default, which is pinned here.
            if value is not None and value != expected:
                raise ConfigError(f"ds_config: remove {where}{key}, {why}")
        elif free is not None and key not in free and _is_on(value):
            raise ConfigError(
                f"ds_config: remove {where}{key}; the file says how memory is divided, and this key is not known to "
                f"leave the result as it is"
            )


def build(
    config: dict[str, Any], micro_batch: int, accumulation: int, world_size: int, compression: str
) -> dict[str, Any]:
    """The configuration for ``deepspeed.initialize``.

    config        the launcher's, after ``check``
    micro_batch   clips per process and micro batch; accumulation: micro batches per process and step
    compression   gradient_compression: "none" or "bf16"
    Raises ConfigError when the file fixes other batch sizes.
    """
    config = without_auto(config)
    sizes = dict(zip(SIZES, (micro_batch, accumulation, micro_batch * accumulation * world_size), strict=True))
    for key, size in sizes.items():
        # Accelerate writes an accumulation of 1 into a file without one.
        if config.get(key, size) not in (size, 1):
            raise ConfigError(f"ds_config: {key} is {config[key]}, this run's is {size}; remove it or say auto")
    # Drop sections that are switched off: some versions of DeepSpeed refuse even these.
    config = {key: value for key, value in config.items() if key in FREE} | sizes
    config |= {key: value for key, (value, _) in PINNED.items()}
    config["zero_optimization"] |= {key: value for key, (value, _) in PINNED_ZERO.items()}
    # At stages 1 and 2 DeepSpeed receives the gradients one by one, in the order of the tensors, and sees no pass.
    config["zero_optimization"] |= {"round_robin_gradients": False, "ignore_unused_parameters": True}
    # With DeepSpeed's own 1e9 values a third of medium would stay gathered, for a base that is divided to save memory.
    config["zero_optimization"].setdefault("stage3_max_reuse_distance", 0)
    # An option that is off unless requested; versions that do not know it refuse it.
    config["zero_optimization"].pop("parameter_alignment", None)
    config |= {"fp16": {"enabled": False}, "bf16": {"enabled": False}}
    config["communication_data_type"] = "bf16" if compression == "bf16" else "fp32"
    return config
