"""The `sa3dist` command: the whole road, or one stage of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sa3dist import __version__, train
from sa3dist.errors import CheckpointError

if TYPE_CHECKING:
    from sa3dist.run import Run


def shard_only(run: Run) -> None:
    run.shard()


def encode_only(run: Run) -> None:
    base = run.open_base()
    run.encode(base, run.shard(), everything=True)


def loop_only(run: Run) -> None:
    base = run.open_base()
    encoded = run.encode(base, run.shard())
    run.prepare(base, encoded)
    run.train(base, encoded)


def export_only(run: Run) -> None:
    base = run.open_base()
    encoded = run.encode(base, run.shard(), everything=False)
    run.prepare(base, encoded)
    if run.step == 0:
        raise CheckpointError(f"{run.settings.output_dir}: no checkpoint to export; run sa3dist loop first")
    train.finish(run, base)


COMMANDS: dict[str, tuple[str, Callable[[Run], None]]] = {
    "train": ("the whole road: shard, encode, loop, export", train.whole_road),
    "shard": ("check the clips and write them as WebDataset shards with an index", shard_only),
    "encode": ("encode every clip and caption into the work directory", encode_only),
    "loop": ("train and save checkpoints, without exporting", loop_only),
    "export": ("write the adapter file of the newest checkpoint; export PATH: from a checkpoint alone", export_only),
}


def usage() -> str:
    lines = [f"  {name:<8} {about}" for name, (about, _) in COMMANDS.items()]
    lines.append(f"  {'inspect':<8} look at a data set and what training would do with each clip")
    lines.append(f"  {'plan':<8} predict memory and time of a run, or find settings that fit")
    lines.append(f"  {'merge':<8} several adapters into one file, or adapters into a base")
    lines.append(f"  {'submit':<8} start a run on this machine, under Slurm or on Kubernetes")
    return (
        "usage: sa3dist COMMAND [CONFIG.yaml|REQUEST.json] [key=value ...]\n\n"
        + "\n".join(lines)
        + "\n\nsa3dist COMMAND --help lists the keys."
    )


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("--version", "-V"):
        print(f"sa3dist {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "inspect":
        from sa3dist import inspection_text

        return inspection_text.main(words[1:])
    if words[0] == "plan":
        from sa3dist import plan_command

        return plan_command.main(words[1:])
    if words[0] == "merge":
        from sa3dist import merge

        return merge.main(words[1:])
    if words[0] == "export":
        from sa3dist import export_command

        if export_command.is_path(words[1:]):
            return export_command.main(words[1:])
    if words[0] == "submit":
        from sa3dist import submit

        return submit.main(words[1:])
    if words[0] not in COMMANDS:
        known = ", ".join([*COMMANDS, "inspect", "plan", "merge", "submit"])
        print(f"sa3dist: {words[0]!r} is no command; choose {known}", file=sys.stderr)
        return 2
    about, stages = COMMANDS[words[0]]
    return train.run_stages(f"sa3dist {words[0]}", about, stages, words[1:])


if __name__ == "__main__":
    sys.exit(main())
