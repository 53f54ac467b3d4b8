"""A trainer on the tiny base with real settings."""

import sa3dist
from sa3dist import config
from sa3dist.adapters import adapter_parameters, attach_adapter
from sa3dist.training.run_plan import RunPlan
from sa3dist.training.trainer import Trainer
from tests.helpers.golden import golden
from tests.helpers.recorded_step import recorded_batch


def make_settings(**changes):
    """The settings tree of a short float32 run."""
    values = {"mixed_precision": "no", "learning_rate": 1e-3, "save_every": 2, "keep_checkpoints": 2, "log_every": 1}
    return config.build({"audio_data_url": "clips.zip", **values, **changes})


def make_trainer(group, steps, settings=None, times=1, accumulation=1, kind="lora", include=None, **plan):
    """A trainer on the tiny base, and the micro batch it is given again and again, ``times`` as long as recorded."""
    base = sa3dist.load_base(golden("tiny-sa3"))
    attach_adapter(base, kind, rank=2, seed=1, include=include)
    batch = recorded_batch(base)
    for name in ("latents_BDT", "noised_BDT", "target_BDT", "inpaint_mask_B1T"):
        setattr(batch, name, getattr(batch, name).repeat(1, 1, times))
    work = RunPlan(steps, accumulation, 2, 2 * accumulation * group.world_size, 42, {}, ["a", "b"], **plan)
    return Trainer(base, adapter_parameters(base), settings or make_settings(), work, group), batch
