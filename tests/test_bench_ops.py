"""The benchmarks of single ops at tiny sizes: what they compare computes the same thing."""

import pytest
import timing
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


def test_a_cpus_peak_memory_is_that_of_the_tensors_alive_at_once():
    def run():
        first, second = torch.empty(1000, 1000), torch.ones(1000, 1000)
        del first
        third = torch.empty(500, 1000)
        return second @ second, third

    run()
    assert timing.peak_bytes(run, CPU) == 10_000_000
    assert timing.peak_bytes(lambda: None, CPU) == 0


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
