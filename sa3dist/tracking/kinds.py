"""The supported trackers, by Accelerate's names: how each opens or continues a run, and logs a preview."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sa3dist.errors import ConfigError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers see it.

    id             the same for all starts that continue the run
    resumed_from   step of the checkpoint that is continued; None for a new run
    settings       plain values by name
    """

    project: str
    name: str
    id: str
    output_dir: Path
    resumed_from: int | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class Preview:
    number: int
    prompt: str
    audio: Path
    picture: Path


class Tracker:
    """One of Accelerate's trackers, used without its Accelerator, on rank 0 only.

    modules   required modules; the extra that installs them has the tracker's name
    """

    modules: ClassVar[tuple[str, ...]]

    def __init__(self, run: TrackedRun) -> None:
        self.tracker = self.open(run)
        # Otherwise it would ask Accelerate at every call whether this is rank 0.
        self.tracker.main_process_only = False
        self.tracker.start()
        if run.resumed_from is None:
            self.store_settings(run.settings)

    def open(self, run: TrackedRun) -> GeneralTracker:
        """Create Accelerate's tracker, without starting it."""
        raise NotImplementedError

    def store_settings(self, settings: dict[str, Any]) -> None:
        self.tracker.store_init_configuration(settings)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.tracker.log(values, step=step)

    def log_preview(self, step: int, preview: Preview) -> None:
        """Log audio and spectrogram of a preview."""
        raise NotImplementedError

    def finish(self) -> None:
        self.tracker.finish()


class TensorBoard(Tracker):
    """Event files in ``output_dir/tensorboard``."""

    modules = ("tensorboard", "torch.utils.tensorboard", "PIL.Image", "soundfile")

    def open(self, run: TrackedRun) -> GeneralTracker:
        from accelerate.tracking import TensorBoardTracker

        # Readers ignore events of earlier starts from this step on.
        first = 0 if run.resumed_from is None else run.resumed_from + 1
        return TensorBoardTracker("tensorboard", run.output_dir, purge_step=first)

    def store_settings(self, settings: dict[str, Any]) -> None:
        # Not as hyperparameters, for which Accelerate would add another run to the list.
        lines = [f"    {name}: {value}" for name, value in settings.items()]
        self.tracker.writer.add_text("settings", "\n".join(lines), 0)

    def log_preview(self, step: int, preview: Preview) -> None:
        import numpy as np
        import soundfile
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        writer, tag = self.tracker.writer, f"previews/{preview.number}"
        # Not add_audio, which supports one channel only.
        audio_NC, rate_hz = soundfile.read(preview.audio, dtype="int16", always_2d=True)
        wav = io.BytesIO()
        soundfile.write(wav, audio_NC, rate_hz, format="WAV")
        audio = Summary.Audio(
            sample_rate=rate_hz,
            num_channels=audio_NC.shape[1],
            length_frames=len(audio_NC),
            encoded_audio_string=wav.getvalue(),
            content_type="audio/wav",
        )
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=f"{tag}/audio", audio=audio)]), step)
        picture = np.asarray(Image.open(preview.picture).convert("RGB"))
        writer.add_image(f"{tag}/spectrogram", picture, step, dataformats="HWC")
        writer.add_text(f"{tag}/prompt", preview.prompt or "(empty)", step)
        writer.flush()


class MediaTracker(Tracker):
    """A tracker whose module has ``Audio`` and ``Image``, which are logged like values."""

    def log_preview(self, step: int, preview: Preview) -> None:
        module = importlib.import_module(self.modules[0])
        tag, caption = f"previews/{preview.number}", preview.prompt or "(empty)"
        audio = module.Audio(str(preview.audio), caption=caption)
        picture = module.Image(str(preview.picture), caption=caption)
        self.tracker.log({f"{tag}/audio": audio, f"{tag}/spectrogram": picture}, step=step)


class Wandb(MediaTracker):
    modules = ("wandb",)

    def open(self, run: TrackedRun) -> GeneralTracker:
        import wandb
        from accelerate.tracking import WandBTracker

        # Do not capture the console or ask for a key. Without silent=True it was seen to hang at the end.
        settings = wandb.Settings(console="off", silent=True, login_timeout=1)
        return WandBTracker(run.project, name=run.name, id=run.id, resume="allow", settings=settings)


class Trackio(MediaTracker):
    modules = ("trackio",)

    def open(self, run: TrackedRun) -> GeneralTracker:
        from accelerate.tracking import TrackioTracker

        return TrackioTracker(run.project, name=f"{run.name}-{run.id}", resume="allow", embed=False)


class Mlflow(Tracker):
    """MLflow. Previews are logged as artifacts of the run."""

    modules = ("mlflow",)

    def open(self, run: TrackedRun) -> GeneralTracker:
        import mlflow
        from accelerate.tracking import MLflowTracker

        tag = "sa3dist.id"
        earlier = mlflow.search_runs(
            experiment_names=[run.project], filter_string=f"tags.`{tag}` = '{run.id}'", output_format="list"
        )
        run_id = earlier[0].info.run_id if earlier else None
        return MLflowTracker(run.project, run_id=run_id, run_name=run.name, tags={tag: run.id})

    def log_preview(self, step: int, preview: Preview) -> None:
        for path in (preview.audio, preview.picture, preview.audio.with_suffix(".json")):
            self.tracker.log_artifact(str(path), artifact_path=f"previews/step-{step:08d}")


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": Mlflow,
}


def chosen(log_with: Sequence[str] | None) -> dict[str, type[Tracker]]:
    """The trackers in the setting ``log_with``, by name. Raises ConfigError for an unknown name."""
    names = [name.strip() for words in log_with or () for name in words.split(",")]
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"log_with: {name!r} is no tracker; choose from {', '.join(TRACKERS)}")
    return {name: TRACKERS[name] for name in names}


def load(log_with: Sequence[str] | None) -> None:
    """Import the modules of the trackers. Raises ConfigError if one is missing.

    Call it in the main thread: a loader process forked during an import in another thread would deadlock.
    """
    for name, kind in chosen(log_with).items():
        try:
            for module in ("accelerate.tracking", *kind.modules):
                importlib.import_module(module)
        except ImportError as problem:
            raise ConfigError(
                f"log_with: {name} cannot be imported ({problem}); pip install 'sa3dist[{name}]', or leave it out"
            ) from problem
