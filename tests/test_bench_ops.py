"""The benchmarks of single ops at tiny sizes: what they compare computes the same thing."""

import pytest
import torch

pytest.importorskip("triton")
import bench_gain_gradient  # noqa: E402
import bench_scaled_matmul  # noqa: E402
import bench_thin_norms  # noqa: E402
import bench_weight_pass  # noqa: E402
import op_bench  # noqa: E402
from layer_cases import relative_error  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def first(value):
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.skipif(not op_bench.runs_triton(CPU), reason="Triton was imported without its interpreter")
@pytest.mark.parametrize("bench", [bench_scaled_matmul, bench_gain_gradient, bench_weight_pass, bench_thin_norms])
def test_compared_variants_compute_the_same(bench):
    variants = bench.make_variants(CPU, torch.float32, 5, 18, 21, 3)
    found = {name: first(run()) for name, run in variants.items() if not name.endswith(("frozen", "copy"))}
    assert any("triton" in name or "fused" in name for name in found)
    expected = {}
    for name, value in found.items():
        # "forward fused 16x16" belongs to "forward"; the gain gradient has one quantity only.
        of = name.split()[0] if bench is not bench_gain_gradient else "gain"
        value = value.t() if of == "columns" and value.shape == (21, 3) else value
        assert relative_error(value, expected.setdefault(of, value)) < 1e-5, name
