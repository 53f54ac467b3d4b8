"""Latents of crops instead of whole clips: each crop is encoded separately, as in the reference."""

import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from sa3dist.data.latents.cache import ENCODING_VERSION, EncodedClips, frame_peaks
from sa3dist.data.latents.tensor_files import read_tensors, write_tensors
from sa3dist.data.source.audio import load_clip_audio
from sa3dist.flow.crops import draw_crop, polarity_of_slot
from sa3dist.formats import ClipEntry, digest_of, remove_stale
from sa3dist.model.base import Base


@dataclasses.dataclass(frozen=True)
class CropLatents:
    """The crops of one clip in one polarity, with the interface of ``ClipLatents``. A crop's file is read on demand.

    peaks_T   float32 (valid_frames,): largest absolute sample of each frame of the whole clip
    read      the latents of the crop that begins at a frame
    """

    peaks_T: torch.Tensor
    read: Callable[[int], torch.Tensor]

    @property
    def valid_frames(self) -> int:
        return len(self.peaks_T)

    def window(self, start: int, frames: int) -> torch.Tensor:
        """The first ``frames`` frames of the crop at ``start``, float32 (D, frames)."""
        return self.read(start)[:, :frames]


class EncodedCrops(EncodedClips):
    """Reads and writes single crops. A clip shorter than the crop is zero-padded first, as in the reference.

    crop_frames   length of every crop in latent frames
    keep          whether crops stay in the work directory for later epochs and runs, or are removed after use
    """

    def __init__(self, *args, crop_frames: int, keep: bool) -> None:
        super().__init__(*args)
        self._limit = crop_frames
        self._peaks_dir = self._latents_dir.with_name("peaks")
        self.keep = keep
        if not keep:
            self._latents_dir.mkdir(parents=True, exist_ok=True)
            remove_stale(self._latents_dir.glob(".on-the-fly-*"))
            # One folder per process: only the process itself knows when a crop has been used.
            self._latents_dir = Path(tempfile.mkdtemp(prefix=".on-the-fly-", dir=self._latents_dir))
            weakref.finalize(self, shutil.rmtree, self._latents_dir, ignore_errors=True)

    def peaks_path(self, clip: ClipEntry) -> Path:
        name = digest_of("peaks", str(self.sample_rate_hz), str(self.samples_per_frame), clip.audio_sha256)
        return self._peaks_dir / name[:2] / f"{name}.safetensors"

    def crop_path(self, clip: ClipEntry, flipped: bool, start: int) -> Path:
        place = f"{start}+{self._limit}"
        encoder = self.shards.encoders.autoencoder
        name = digest_of(ENCODING_VERSION, "crop", encoder, clip.audio_sha256, str(flipped), place)
        return self._latents_dir / name[:2] / f"{name}.safetensors"

    def latents(self, clip: ClipEntry, flipped: bool) -> CropLatents:
        """Raises EnvironmentFailure, naming file and clip, if a file is damaged or holds a non-finite value."""

        def read(start: int) -> torch.Tensor:
            path = self.crop_path(clip, flipped, start)
            return read_tensors(path, f"crop at frame {start} of clip {clip.key}")["latents"]

        return CropLatents(read_tensors(self.peaks_path(clip), f"peaks of clip {clip.key}")["peaks"], read)

    def load_slot(self, clip: ClipEntry, seed: int, slot: int) -> torch.Tensor | None:
        """Audio of the crop for ``slot``, float32 (2, crop_frames x samples_per_frame); None if already encoded.

        Thread-safe. The first crop of a clip decodes the whole clip, because drawing a crop needs the clip's peaks.
        """
        audio_CN = None
        if not self.peaks_path(clip).exists():
            audio_CN = load_clip_audio(self.index, clip, self.sample_rate_hz)
            write_tensors(self.peaks_path(clip), {"peaks": frame_peaks(audio_CN, self.samples_per_frame)})
        path, start, flipped = self._crop_of_slot(clip, seed, slot)
        if path.exists():
            return None
        first, end = start * self.samples_per_frame, (start + self._limit) * self.samples_per_frame
        if audio_CN is None:
            part_CN = load_clip_audio(self.index, clip, self.sample_rate_hz, first, end)
        else:
            part_CN = audio_CN[:, first:end]
        padded_CN = torch.zeros(part_CN.shape[0], end - first)
        padded_CN[:, : part_CN.shape[1]] = -part_CN if flipped else part_CN
        return padded_CN

    def encode_slot(
        self, base: Base, clip: ClipEntry, seed: int, slot: int, loaded_CN: torch.Tensor | None = None
    ) -> Path:
        """Encode the crop for ``slot`` unless already encoded; returns its file.

        loaded_CN   what ``load_slot`` returned; if None, the file may have been removed since, so it is checked again
        """
        if loaded_CN is None:
            loaded_CN = self.load_slot(clip, seed, slot)
        path, _, _ = self._crop_of_slot(clip, seed, slot)
        if loaded_CN is not None and not path.exists():
            latents_1DT = base.encode_audio(loaded_CN[None].to(base.device))
            write_tensors(path, {"latents": latents_1DT[0].float().cpu().contiguous()})
        return path

    def _crop_of_slot(self, clip: ClipEntry, seed: int, slot: int) -> tuple[Path, int, bool]:
        """File of the slot's crop, its first frame, and whether it is flipped."""
        peaks_T = read_tensors(self.peaks_path(clip), f"peaks of clip {clip.key}")["peaks"]
        start, _ = draw_crop(peaks_T, self._limit, seed, slot)
        flipped = polarity_of_slot(seed, slot)
        return self.crop_path(clip, flipped, start), start, flipped

    def slot_bytes(self, clip: ClipEntry) -> int:
        """Bytes of what ``load_slot`` returns."""
        return 8 * self._limit * self.samples_per_frame
