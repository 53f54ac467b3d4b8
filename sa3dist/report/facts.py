"""Texts and tables of a report: state of the run, settings, data set, versions and warnings."""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sa3dist.errors import counted, span
from sa3dist.report.charts import GIGABYTE, base_loss, running_median
from sa3dist.report.run_folder import RunFolder, is_number

STATES = {
    "done": "finished",
    "interrupted": "interrupted, can be continued",
    "refused": "refused",
    "failed": "ended by the machine or the numbers",
    "crashed": "ended by an error of the program",
}
# Bins of the histogram of clip lengths.
LENGTH_BINS = 20
Facts = list[tuple[str, str]]


def state(run: RunFolder) -> str:
    """The state of the run in a few words."""
    last = run.settings.get("number_of_steps")
    steps = f"step {run.step} of {last}" if isinstance(last, int) else f"step {run.step}"
    # A run has no status until it ends.
    ended = STATES.get(run.status.get("state"))
    if early := run.result.get("ended_early") if run.status.get("state") == "done" else None:
        return f"{steps}, ended early: {early}"
    if ended is None:
        ended = "all steps done" if run.step == last else "running when this page was written"
    message = run.status.get("message")
    return f"{steps}, {ended}{f': {message}' if message and message != 'done' else ''}"


def overview(run: RunFolder) -> Facts:
    """The figures at the top of the page, as far as known."""
    rows = [("training loss", _change(running_median(run.curve("loss")[1])))]
    steps, losses = run.curve("val/loss")
    base, after = base_loss(run), [(loss, step) for step, loss in zip(steps, losses, strict=True) if step]
    if after and base:
        best, at = min(after)
        percent = 100 * (best / base - 1)
        compared = f"{abs(percent):.1f} % {'below' if percent < 0 else 'above'} the base"
        rows.append(("validation, best", f"{best:.4f} at step {at}, {compared}"))
    clips = _rates(run)
    rows.append(("speed", f"{statistics.median(clips):.3g} clips/s" if clips else ""))
    memory = run.curve("reserved_bytes")[1] or run.curve("peak_bytes")[1]
    rows.append(("memory, most", f"{max(memory) / GIGABYTE:.1f} GB" if memory else ""))
    trained = sum(row["step_seconds"] for row in run.rows if is_number(row.get("step_seconds")))
    logged = [row["step"] for row in run.rows if is_number(row.get("step_seconds"))]
    if logged:
        rows.append(("time in steps", span(trained / len(logged) * max(logged))))
    return [(name, text) for name, text in rows if text]


def _change(values: Sequence[float]) -> str:
    return f"{values[0]:.4f} at first, now {values[-1]:.4f}" if values else ""


def _rates(run: RunFolder) -> list[float]:
    return [
        row["clips_seen"] / row["step"] / row["step_seconds"]
        for row in run.rows
        if row["step"]
        and is_number(row.get("clips_seen"))
        and is_number(row.get("step_seconds"))
        and row["step_seconds"]
    ]


def startup(run: RunFolder) -> list[tuple[str, float]]:
    """Parts of the newest start that reached a step, in order, with their seconds."""
    parts = next((row["startup_seconds"] for row in reversed(run.rows) if row.get("startup_seconds")), {})
    items = parts.items() if isinstance(parts, dict) else ()
    return [(name.replace("_", " "), value) for name, value in items if is_number(value)]


def copying(run: RunFolder) -> list[str]:
    """Sentences on whether previews copy training clips; the first is a summary."""
    if not run.copies:
        return []
    newest = run.copies[-1]
    if not newest.get("judged", True):
        reason = newest.get("reason") or "copying cannot be judged"
        return [f"{reason[:1].upper()}{reason[1:]}."]
    warnings = [
        f"Step {row['step']}: {preview['warning']}"
        for row in run.copies
        for preview in row.get("previews") or ()
        if isinstance(preview, dict) and preview.get("warning")
    ]
    first = f"{counted(len(warnings), 'preview')} closer to a training clip than held-out audio ever is."
    return [first, *warnings] if warnings else ["No preview is closer to a training clip than held-out audio is."]


def copies_are_judged(runs: Sequence[RunFolder]) -> bool:
    """Whether previews of any run were compared with held-out clips."""
    return any(run.copies and run.copies[-1].get("judged", True) for run in runs)


def settings_table(runs: Sequence[RunFolder]) -> list[tuple[str, list[str], bool]]:
    """(name, value in every run, whether they differ), those that differ first."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [as_text(run.settings.get(name)) for run in runs]
        rows.append((name, values, len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row[2])


def as_text(value: Any) -> str:
    """A setting as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(f"“{item}”" for item in value) if isinstance(value, list) else str(value)


def data_set(run: RunFolder) -> Facts:
    """Facts about the training clips."""
    about = run.description
    clips = about.get("dataset_clips")
    seconds = about.get("dataset_seconds")
    rows = [
        ("source", str(run.settings.get("audio_data_url", ""))),
        ("clips", str(clips or "")),
        ("audio", span(seconds) if is_number(seconds) else ""),
        ("left out", ", ".join(map(str, about.get("skipped_clips") or ()))),
    ]
    if index := run.index:
        lengths = [clip.seconds for clip in index.clips]
        spread = (
            f"{min(lengths):.1f} to {max(lengths):.1f} s, median {statistics.median(lengths):.1f}" if lengths else ""
        )
        captions = Counter(clip.caption for clip in index.clips)
        rows += [
            ("length", spread),
            ("formats", _tally(clip.extension for clip in index.clips)),
            ("sample rates", _tally(f"{clip.sample_rate_hz} Hz" for clip in index.clips)),
            ("channels", _tally(str(clip.channels) for clip in index.clips)),
            ("captions", f"{len(captions)} different"),
        ]
    if held := run.held_out:
        rows.append(("held out", f"{len(held)}: {', '.join(map(str, held[:20]))}{' …' if len(held) > 20 else ''}"))
    return [(name, text) for name, text in rows if text]


def _tally(values: Any) -> str:
    return ", ".join(f"{count} × {value}" for value, count in Counter(values).most_common())


def provenance(run: RunFolder) -> Facts:
    """Versions, digests and machines."""
    about, newest = run.description, run.starts[-1] if run.starts else {}
    names = {
        "sa3dist": newest.get("sa3dist") or about.get("sa3dist_version"),
        "torch": newest.get("torch") or about.get("torch"),
        **{name: newest.get(name) for name in ("python", "cuda", "device", "host")},
        "processes": newest.get("processes") or about.get("world_size"),
        "clips per step": about.get("effective_batch_size"),
        "base": about.get("base_model"),
        **{
            f"{name}, SHA-256": about.get(f"{key}_sha256")
            for name, key in (("base", "base"), ("data set", "dataset"), ("settings", "config"))
        },
    }
    rows = [(name, str(value)) for name, value in names.items() if value]
    return [*rows, *((f"start {n}", _start(row)) for n, row in enumerate(run.starts, 1) if len(run.starts) > 1)]


def _start(row: dict[str, Any]) -> str:
    after = row.get("resumed_from")
    how = f"continued after step {after}" if after else "from the beginning"
    return f"{row.get('time', '')}, {how}, {row.get('device', '')}"


def warnings(run: RunFolder) -> list[dict[str, Any]]:
    """The run's warnings in order. Equal ones are merged, with their count, first and last time."""
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for row in run.warnings:
        level, message, time = str(row.get("level", "")).lower(), str(row["message"]), str(row.get("time", ""))
        new = {"level": level, "message": message, "first": time, "count": 0}
        warning = merged.setdefault((level, message), new)
        warning["count"] += 1
        warning["last"] = time
    return list(merged.values())
