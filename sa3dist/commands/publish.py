"""`sa3dist publish RUN USER/NAME`: upload a run's adapter and its card to a repository of the Hugging Face hub."""

import argparse

from sa3dist.adapters.file import read_adapter_file
from sa3dist.data.remote.local_paths import home_path
from sa3dist.publishing import card, files, hub
from sa3dist.runtime import run_lock
from sa3dist.runtime.exit_status import command

ARGUMENTS = {
    "run": {"type": home_path, "metavar": "RUN", "help": "a run's output_dir, or a folder that sa3dist export wrote"},
    "repository": {"metavar": "USER/NAME", "help": "on the hub; created if it does not exist"},
    "--public": {"action": "store_true", "help": "make it public; default: a private repository"},
    "--with-captions": {"action": "store_true", "help": "show prompts in the card that are captions of the data set"},
    "--replace-card": {"action": "store_true", "help": "replace a README.md there that was edited by hand"},
    "--dry-run": {"action": "store_true", "help": "list what would be uploaded; nothing is written or sent"},
}


def publish(options: argparse.Namespace) -> None:
    """Write the card, upload, and print what was uploaded. Raises like ``files.write_beside`` and ``hub.upload``."""
    folder, repo_id = options.run, options.repository
    hub.check_name(repo_id)
    texts = files.make(folder, options.with_captions)
    for name in files.ADAPTERS:
        if (folder / name).is_file():
            # Do not publish a damaged file.
            read_adapter_file(folder / name).layers()
    if options.dry_run:
        existing = card.read(folder / files.CARD_NAME)
        if existing is not None and not card.is_as_written(existing):
            del texts[files.CARD_NAME]
        sizes = {path: (folder / path).stat().st_size for path in files.to_upload(folder)}
        sizes |= {name: len(text.encode()) for name, text in texts.items()}
        _list(sizes)
        new = "public" if options.public else "private"
        print(f"nothing sent; these files would go to {repo_id} ({new} if it is new)")
        return
    with run_lock.held(folder):
        files.write_beside(folder, options.with_captions)
    paths = files.to_upload(folder)
    address, private = hub.upload(folder, paths, repo_id, options.public, options.replace_card)
    _list({path: (folder / path).stat().st_size for path in paths})
    stays = "; it was before, its settings page changes that" if private and options.public else ""
    print(f"published at {address} ({'private' if private else 'public'}{stays})")


def _list(sizes: dict[str, int]) -> None:
    for path, size in sizes.items():
        print(f"{size:>12,}  {path}")


# Exit code 0 when all is uploaded; 2 for a user's mistake; 70 if the hub fails: run again to continue.
main = command(
    "sa3dist publish",
    ARGUMENTS,
    publish,
    description="Upload a run's adapter, its card and its previews to the Hugging Face hub, and nothing else of the "
    "run.",
)
