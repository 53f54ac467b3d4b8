"""The model on CUDA: the recorded tensors in every dtype, and a forward that never waits for the device."""

import pytest
import torch
from safetensors.torch import save_file

from sa3dist.model.checkpoint import CheckpointFile, fill
from sa3dist.model.compiled import _token_sums_work
from sa3dist.model.kernel_trial import gate_kernel_works
from sa3dist.model.loading import load_base
from sa3dist.model.random_weights import random_base
from sa3dist.model.self_attention import kernel_works
from sa3dist.model.staged_reads import STAGED_BYTES, THREADS
from tests.helpers.golden import golden

pytestmark = pytest.mark.gpu

# Relative L2 error of a velocity; float32 is compared element by element below.
ROUNDING = {torch.float16: 0.005, torch.bfloat16: 0.02}


def on_cuda(recorded):
    return {key: value.cuda() for key, value in recorded.items()}


def velocity(base, tensors, row, masked):
    mask = tensors["dit.padding_mask"] if masked else None
    cross, embed, local = (tensors[f"dit.{key}"] for key in ("cross_attn_cond", "global_cond", "local_add_cond"))
    return base.dit(tensors["dit.x"], tensors["dit.t"][row], cross, embed, local, mask)


@pytest.fixture
def exact_float32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("masked", [False, True])
def test_float32_on_cuda_is_the_references(tiny_name, recorded, masked, exact_float32):
    base, tensors = load_base(golden(tiny_name), device="cuda"), on_cuda(recorded)
    name = "pad_varlen" if masked else "nomask"
    ours = torch.stack([velocity(base, tensors, row, masked) for row in range(4)])
    # sin and cos of up to 6e4 rad differ between devices: the recorded tolerance with room for one ulp of the angle.
    torch.testing.assert_close(ours, tensors[f"dit.v.inpaint.{name}"], atol=5e-3, rtol=1e-3)
    torch.testing.assert_close(base.encode_audio(tensors["same.audio"]), tensors["same.latents"], atol=1e-4, rtol=0)
    torch.testing.assert_close(base.decode_latents(tensors["same.latents"]), tensors["same.decoded"], atol=1e-4, rtol=0)
    long = base.encode_audio(tensors["same.audio_long"])
    torch.testing.assert_close(long, tensors["same.latents_long_chunked"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_low_precision_on_cuda_stays_near_the_reference(tiny_name, recorded, dtype):
    base, tensors = load_base(golden(tiny_name), device="cuda", dtype=dtype), on_cuda(recorded)
    for masked, name in ((False, "nomask"), (True, "pad_varlen")):
        expected = tensors[f"dit.v.inpaint.{name}"][2]
        with torch.autocast("cuda", dtype):
            ours = velocity(base, tensors, 2, masked)
        assert (ours - expected).norm() / expected.norm() < ROUNDING[dtype]


def test_velocity_and_its_backward_never_wait_for_the_device(recorded, tiny_name):
    base, tensors = load_base(golden(tiny_name), device="cuda", dtype=torch.bfloat16), on_cuda(recorded)
    base.requires_grad_(True)
    seconds = torch.tensor([3.0, 5.0], device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            out = base.velocity(
                tensors["dit.x"],
                tensors["dit.t"][2],
                tensors["prompt.embedding"][:2],
                tensors["prompt.mask"][:2],
                seconds,
                padding_mask_BT=tensors["dit.padding_mask"],
                inpaint_mask_B1T=tensors["dit.inpaint_mask"],
                inpaint_latents_BDT=tensors["dit.x"],
                drop_cross_B=seconds > 4,
            )
        out.square().mean().backward()
        return out

    # The first step uploads the frequency table and picks kernels.
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_read_to_cuda_have_the_bits_that_a_cpu_rounds_to(dtype):
    here, there = (load_base(golden("tiny-sa3"), device, dtype) for device in ("cpu", "cuda"))
    assert all(torch.equal(there.state_dict()[name].cpu(), value) for name, value in here.state_dict().items())


def test_reading_to_cuda_takes_no_second_copy_of_what_is_read(tmp_path):
    stored = {f"{number}.weight": torch.randn(4096, 4096) for number in range(4)}
    save_file(stored, tmp_path / "model.safetensors")
    with torch.device("meta"):
        module = torch.nn.ModuleDict({str(number): torch.nn.Linear(4096, 4096, bias=False) for number in range(4)})
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fill(module, "", CheckpointFile(tmp_path / "model.safetensors"), "cuda", torch.bfloat16)
    whole = 4 * 4096 * 4096 * 2
    assert torch.cuda.memory_allocated() - before == whole
    assert torch.cuda.max_memory_allocated() - before <= whole + 2 * THREADS * STAGED_BYTES
    assert all(torch.equal(module[name[0]].weight.cpu(), value.bfloat16()) for name, value in stored.items())


def test_random_base_on_cuda_reads_back_the_weights_it_has():
    base = random_base("small-music-base", depth=1, device="cuda", dtype=torch.bfloat16)
    layer = "model.transformer.layers.0.self_attn.to_qkv"
    assert torch.equal(base.fp32_weight(layer).bfloat16(), base.model.get_submodule(layer).weight.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_of_queries_and_keys_agrees_with_torch(dtype):
    assert kernel_works(torch.device("cuda"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_of_modulations_agrees_with_torch(dtype):
    assert _token_sums_work(torch.device("cuda"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [6144, 37])
def test_the_kernel_of_gates_agrees_with_torch(dtype, channels):
    assert gate_kernel_works(torch.device("cuda"), dtype, channels)
