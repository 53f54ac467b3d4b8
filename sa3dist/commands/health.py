"""`sa3dist health RUN|FILE`: measure how an adapter changes its base, and judge whether that is healthy."""

import argparse

from sa3dist.adapters import adapted_layers
from sa3dist.adapters.transfer import load_adapter_file
from sa3dist.commands.base_option import base_of_adapter
from sa3dist.commands.export import read_source
from sa3dist.data.remote.local_paths import home_path
from sa3dist.listening.health import Losses
from sa3dist.listening.health_numbers import measure_layer, summary
from sa3dist.listening.verdict import judge
from sa3dist.model.loading import load_base
from sa3dist.runtime.exit_status import command, positive
from sa3dist.training.row_files import METRICS_NAME

ARGUMENTS = {
    "source": {
        "type": home_path,
        "metavar": "RUN|FILE",
        "help": "a run's output_dir (its newest checkpoint), or a file",
    },
    "--base": {"metavar": "MODEL", "help": "the base it was trained on; default the one it names"},
    "--layers": {
        "type": positive,
        "default": 10,
        "metavar": "N",
        "help": "layers to list, largest updates first (default 10)",
    },
}


def health(options: argparse.Namespace) -> None:
    """Print the verdict, its reasons and the layers. Raises ConfigError if no base is known."""
    file, _ = read_source(options.source)
    name = base_of_adapter(options.source, options.base, [file.base], "--base")
    base = load_base(name, encoder=False)
    load_adapter_file(base, file)
    row = summary((name, measure_layer(layer)) for name, layer in adapted_layers(base).items())
    verdict, reasons = judge(row, Losses(options.source / METRICS_NAME).read())
    print(f"{verdict}: {'; '.join(reasons)}")
    drift = row["drift"]
    if drift:
        print("drift {mean:.4f} on average (5 % {p5:.4f}, 95 % {p95:.4f}), {negative:.2%} negative".format(**drift))
    print(f"update ratio {row['update_ratio']}, effective rank {row['effective_rank']}: means over the layers")
    print(f"{'update ratio':>12} {'eff. rank':>9} {'drift':>9}  layer, largest update first")
    for layer in row["layers"][: options.layers]:
        print(f"{layer['update_ratio']!s:>12} {layer['effective_rank']!s:>9} {layer['drift']!s:>9}  {layer['name']}")


# Exit code 0 whatever the verdict; 2, with one line, if there is nothing to measure.
main = command(
    "sa3dist health",
    ARGUMENTS,
    health,
    description="Measure every adapted layer: drift, size and effective rank of its update. The verdict on a run also "
    "considers its losses.",
)
