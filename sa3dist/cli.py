"""The `sa3dist` command: the whole run, one stage of it, or a program of its own."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from sa3dist import __version__, train
from sa3dist.errors import CheckpointError
from sa3dist.runtime.own_process import as_process

if TYPE_CHECKING:
    from sa3dist.pipeline import Run


def shard_only(run: Run) -> None:
    import torch

    from sa3dist.data.source.cut_captions import text_source, warn_of_cut_captions
    from sa3dist.inspection.measure import measure_clip

    # Clips are measured in parallel, one per core: a single clip needs no threads of its own.
    torch.set_num_threads(1)
    index = run.shard(measure_clip)
    # The stages that need a model report what is wrong with it.
    with contextlib.suppress(CheckpointError):
        if run.group.is_main:
            warn_of_cut_captions(index, text_source(run.settings))


def loop_only(run: Run) -> None:
    run.check()
    run.begin_compiling()
    base = run.open_base()
    encoded = run.encode(base, run.shard())
    run.prepare(base, encoded)
    run.train(base, encoded)


COMMANDS: dict[str, tuple[str, Callable[[Run], None]]] = {
    "train": ("all stages: shard, encode, loop, export", train.all_stages),
    "shard": ("check the clips and write them as WebDataset shards with an index", shard_only),
    "encode": (
        "encode every clip and caption into the work directory",
        lambda run: run.encode(run.open_base(), run.shard(), everything=True),
    ),
    "loop": ("train and save checkpoints, without exporting", loop_only),
    "export": ("write the adapter file of a run's newest checkpoint, or of PATH", lambda run: run.export_saved()),
}


# Commands that are not stages; imported when called.
PROGRAMS = {
    "inspect": ("look at a data set and what training would do with each clip", "sa3dist.inspection.text"),
    "plan": ("predict memory and time of a run, or find settings that fit", "sa3dist.commands.plan"),
    "generate": ("make audio from prompts with a base and adapters", "sa3dist.commands.generate"),
    "merge": ("merge adapters into one file, or into a base", "sa3dist.commands.merge"),
    "verify": ("check whether a program takes every layer of an adapter file", "sa3dist.commands.verify"),
    "health": ("measure what an adapter does to its base, and judge it", "sa3dist.commands.health"),
    "publish": ("upload an adapter with its card to the Hugging Face hub", "sa3dist.commands.publish"),
    "serve": ("an HTTP endpoint that the hosted one's clients use unchanged", "sa3dist.commands.serve"),
    "report": ("write the page of a run, or compare runs", "sa3dist.commands.report"),
    "submit": ("start a run on this machine, under Slurm or on Kubernetes", "sa3dist.commands.submit"),
}


def usage() -> str:
    lines = [f"  {name:<8} {about}" for name, (about, _) in (COMMANDS | PROGRAMS).items()]
    return (
        "usage: sa3dist COMMAND [CONFIG.yaml|REQUEST.json] [key=value ...]\n\n"
        + "\n".join(lines)
        + "\n\nsa3dist COMMAND --help explains a command."
    )


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("--version", "-V"):
        print(f"sa3dist {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = words
    if name in PROGRAMS:
        return importlib.import_module(PROGRAMS[name][1]).main(rest)
    if name == "export":
        from sa3dist.commands import export

        if export.is_path(rest):
            return export.main(rest)
    if name not in COMMANDS:
        known = ", ".join([*COMMANDS, *PROGRAMS])
        print(f"sa3dist: {name!r} is no command; choose {known}", file=sys.stderr)
        return 2
    about, stages = COMMANDS[name]
    return train.run_stages(f"sa3dist {name}", about, stages, rest, trains=name in ("train", "loop"))


def program() -> NoReturn:
    as_process(main)


if __name__ == "__main__":
    program()
