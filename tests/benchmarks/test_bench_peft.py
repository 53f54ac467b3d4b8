"""The comparison with PEFT compares like with like, and PEFT's DoRA is an independent oracle of our forward pass."""

import bench_adapted_linear
import pytest


@pytest.mark.parametrize("adapter_type", ["lora", "dora-rows"])
def test_outputs_and_input_gradients_are_pefts(monkeypatch, adapter_type):
    # Here, because every process of the suite reads this file, and PEFT takes seconds to import.
    pytest.importorskip("peft")
    import bench_peft

    monkeypatch.setitem(bench_adapted_linear.SHAPES, "small", {"wide": (24, 40, True), "square": (17, 17, False)})
    words = ["--tokens", "11", "--rank", "3", "--repeats", "1", "--device", "cpu", "--adapter-type", adapter_type]
    found = bench_peft.main(words)
    assert found["ratio"] > 0
    for row in found["rows"]:
        output, grad_x, grad_down, grad_up, *rest = row["distances"]
        assert max(output, grad_x, *rest) < 1e-5
        if adapter_type == "lora":
            assert max(grad_down, grad_up) < 1e-5
        else:
            # PEFT leaves the norm out of the gradient; were it in, both would agree.
            assert min(grad_down, grad_up) > 1e-3
