"""A tiny base with a trained adapter on any device, and what a process of its own computes with it."""

import torch

import sa3dist
from sa3dist.adapters import adapter_parameters, attach_adapter
from sa3dist.model.compiled import compile_blocks
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from sa3dist.training.graph_recorder import Recorder
from sa3dist.training.run_plan import RunPlan
from sa3dist.training.shape_ladder import ShapeLadder
from sa3dist.training.trainer import Trainer
from tests.helpers.adapter_base import adapter_digest
from tests.helpers.golden import golden
from tests.helpers.host_recorder import HostRecorder
from tests.helpers.recorded_step import StepSettings, recorded_batch


def make_trained(device, adapter_type, dtype=torch.float32):
    """A tiny base with an adapter moved off its initial values, and a recorded micro batch, on ``device``."""
    base = sa3dist.load_base(golden("tiny-sa3"), device=device, dtype=dtype)
    attach_adapter(base, adapter_type, rank=4)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(base).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw).to(device)
    return base, recorded_batch(base).to(torch.device(device))


def trained_digest(device_name, way):
    """Digest of an adapter after six bf16 steps with deterministic kernels. Runs in a process of its own.

    way   "plain"; "compiled": whole blocks, the compiler's cache as it is; "recorded": compiled, and replayed as graphs
    """
    torch.use_deterministic_algorithms(True)
    device = torch.device(device_name)
    on_cuda = device.type == "cuda"
    base, batch = make_trained(device, "dora-rows", torch.bfloat16)
    work = RunPlan(6, 1, 2, 2, 42, {}, ["a", "b"])
    settings = StepSettings("bf16", adapter_products="auto" if way == "plain" else "formed")
    trainer = Trainer(base, adapter_parameters(base), settings, work, Group(0, 1, device))
    if way != "plain":
        frames, memory = batch.noised_BDT.shape[2], base.dit.transformer.memory
        trainer.ladder = ShapeLadder(frames, memory)
        compile_blocks(base.dit, "inductor" if on_cuda else "aot_eager", tokens=2 * (memory + frames))
    if way == "recorded":
        trainer.record_graphs(Recorder(device) if on_cuda else HostRecorder(), exact=True)
    for _ in range(6):
        trainer.take_step(iter([batch]), StopRequest())
    assert way != "recorded" or trainer.graphs.shapes == 1, "no replay was found equal: see the warning"
    return adapter_digest(base)
