"""What the benchmarks of single layers measure with."""

import timing
import torch

CPU = torch.device("cpu")


def test_a_cpus_peak_memory_is_that_of_the_tensors_alive_at_once():
    def run():
        first, second = torch.empty(1000, 1000), torch.ones(1000, 1000)
        del first
        third = torch.empty(500, 1000)
        return second @ second, third

    run()
    assert timing.peak_bytes(run, CPU) == 10_000_000
    assert timing.peak_bytes(lambda: None, CPU) == 0
