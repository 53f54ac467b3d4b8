"""The profile of a step: time by purpose adds up, and kernels of every kind that CUDA runs have one."""

import re

import bench_step
import profile_step
import pytest
import step_sides
import torch

COMPUTES = re.compile(
    r"(aten|mkldnn)::\w*(mm|linear|matmul|attention|conv|sum|mean|norm|mul|add|sqrt|exp|silu|softmax)"
)


def test_times_add_up_and_whatever_computes_has_a_purpose():
    words = ["--shape", "tiny-medium", "--depth", "2", "--frames", "200", "--rank", "4", "--precision", "fp32"]
    options = bench_step.parse([*words, "--device", "cpu"])
    side = step_sides.Side("ours", options, torch.device("cpu"))
    side.use(1, options.frames)
    found = profile_step.profiled(side)
    assert sum(found["purposes_ms"].values()) == pytest.approx(found["device_ms"], rel=1e-3)
    listed = sum(kernel["ms"] for kernel in found["kernels"])
    assert profile_step.LISTED_SHARE - 1e-3 <= listed / found["device_ms"] <= 1
    assert 0 < found["named_share"] <= 1
    # By name, not by time: on a busy or an odd processor any operation may be the slow one.
    unnamed = [kernel["name"] for kernel in found["kernels"] if kernel["purpose"] == "other"]
    assert not [name for name in unnamed if COMPUTES.match(name)]
    assert {"matrix products", "attention", "adapters' kernels", "optimiser"} <= found["purposes_ms"].keys()


@pytest.mark.parametrize(
    ("kernel", "purpose"),
    [
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "matrix products"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x64x64", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "matrix products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob", "attention"),
        ("form_rows_kernel", "adapters' kernels"),
        ("finish_close_kernel", "adapters' kernels"),
        ("thin_products_kernel", "adapters' kernels"),
        ("_core_sums_kernel", "adapters' kernels"),
        ("triton_poi_fused_add_mul_silu_3", "compiled element-wise"),
        ("void at::native::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor<float, 4>>", "optimiser"),
        ("void at::native::elementwise_kernel<128, 2, at::native::mul>", "element-wise"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "sums and norms"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("void at::native::index_elementwise_kernel<>", "element-wise"),
        ("void at::native::vectorized_gather_kernel<16, long>", "element-wise"),
        ("_gate_gradient_kernel", "own element-wise"),
        ("_queries_and_keys_kernel", "own element-wise"),
        ("_partial_sums_kernel", "sums and norms"),
        ("somebody_elses_kernel", "other"),
    ],
)
def test_kernels_have_the_purpose_their_names_tell(kernel, purpose):
    assert profile_step.purpose(kernel) == purpose


def test_the_device_idles_where_no_kernel_runs():
    # The second ends within the first; then 3 us of nothing, then overlap again, and 1 us at the end.
    kernels = [(0, 10, "a"), (2, 5, "b"), (13, 20, "c"), (18, 25, "d"), (26, 30, "e")]
    found = profile_step.idle(kernels)
    assert found["idle_ms"] * 1e3 * profile_step.STEPS == pytest.approx(4)
    assert [(pair["from"], pair["to"]) for pair in found["idle_between"]] == [("a", "c"), ("d", "e")]
    assert profile_step.idle([]) == {"idle_ms": 0, "idle_between": []}
