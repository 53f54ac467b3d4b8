"""The SAME autoencoder against the reference's recorded tensors, at any length and in linear memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sa3dist.model.chunking import OVERLAP_FRAMES, windows
from sa3dist.model.loading import load_base
from sa3dist.model.sliding_window import SlidingWindow

# tests/golden/tiny-sa3/README.md
SAME = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def autoencoder(tiny_name):
    from tests.helpers.golden import golden

    base = load_base(golden(tiny_name))
    base.decode_latents(torch.zeros(1, base.latent_channels, 1))
    return base.autoencoder


@torch.no_grad()
def test_every_stage_is_the_references(autoencoder, recorded):
    patches = autoencoder.patch(recorded["same.audio"])
    torch.testing.assert_close(patches, recorded["same.patched"], rtol=0, atol=0)
    encoded = autoencoder.encoder(patches)
    torch.testing.assert_close(encoded, recorded["same.encoder_out"], **SAME)
    torch.testing.assert_close(autoencoder.bottleneck.encode(encoded), recorded["same.latents"], **SAME)
    decoded = autoencoder.decoder(autoencoder.bottleneck.decode(recorded["same.latents"]))
    torch.testing.assert_close(decoded, recorded["same.decoder_patches"], **SAME)
    torch.testing.assert_close(autoencoder.unpatch(decoded), recorded["same.decoded"], **SAME)


@torch.no_grad()
def test_ragged_lengths_are_the_references_before_cropping(autoencoder, recorded):
    torch.testing.assert_close(
        autoencoder.encode_once(recorded["same.audio_odd"]), recorded["same.latents_odd"], **SAME
    )
    decoded = autoencoder.decode_once(recorded["same.latents_in_odd"])
    torch.testing.assert_close(decoded, recorded["same.decoded_odd"], **SAME)


def test_base_crops_ragged_lengths_to_whole_frames(tiny_base, recorded):
    latents = tiny_base.encode_audio(recorded["same.audio_odd"])
    torch.testing.assert_close(latents, recorded["same.latents_odd"][:, :, :5], **SAME)
    audio = tiny_base.decode_latents(recorded["same.latents_in_odd"])
    torch.testing.assert_close(audio, recorded["same.decoded_odd"][:, :, : 5 * 32], **SAME)


@torch.no_grad()
def test_long_clip_in_windows_and_in_one_pass_is_the_references(autoencoder, recorded):
    audio, latents = recorded["same.audio_long"], recorded["same.latents_long_chunked"]
    torch.testing.assert_close(autoencoder.encode(audio), latents, **SAME)
    torch.testing.assert_close(autoencoder.encode_once(audio), recorded["same.latents_long_full"], **SAME)
    torch.testing.assert_close(autoencoder.decode(latents), recorded["same.decoded_long_chunked"], **SAME)
    torch.testing.assert_close(autoencoder.decode_once(latents), recorded["same.decoded_long_full"], **SAME)


@torch.no_grad()
def test_recorded_noise_gives_the_references_noisy_passes(autoencoder, recorded):
    latents = autoencoder.encode_once(recorded["same.audio"], recorded.get("same.noisy.encode_noise.0"))
    torch.testing.assert_close(latents, recorded["same.noisy.latents"], **SAME)
    noises = (recorded["same.noisy.decode_noise.0"], recorded["same.noisy.decode_noise.1"])
    decoded = autoencoder.decode_once(recorded["same.latents"], noises)
    torch.testing.assert_close(decoded, recorded["same.noisy.decoded"], **SAME)
    assert (decoded - recorded["same.decoded"]).abs().max() > 1e-3


@pytest.mark.parametrize("samples", [1, 31, 32, 33, 100, 127 * 32 + 5, 129 * 32, 227 * 32 - 1])
def test_any_length_gives_one_frame_per_started_frame_and_windows_agree_with_one_pass(tiny_base, samples):
    audio = torch.randn(2, 2, samples)
    latents = tiny_base.encode_audio(audio)
    frames = -(-samples // 32)
    assert latents.shape == (2, 8, frames)
    with torch.no_grad():
        torch.testing.assert_close(latents, tiny_base.autoencoder.encode_once(audio)[:, :, :frames], **SAME)
        decoded = tiny_base.decode_latents(latents)
        assert decoded.shape == (2, 2, frames * 32)
        whole = tiny_base.autoencoder.decode_once(latents)[:, :, : frames * 32]
        torch.testing.assert_close(decoded, whole, **SAME)


def test_a_clip_is_encoded_the_same_whatever_its_dtype_autocast_or_batch(tiny_base):
    audio = torch.randn(3, 2, 500).half()
    latents = tiny_base.encode_audio(audio)
    assert torch.equal(latents, tiny_base.encode_audio(audio.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(latents, tiny_base.encode_audio(audio.float()))
    torch.testing.assert_close(latents[1:2], tiny_base.encode_audio(audio[1:2]), **SAME)


@pytest.mark.parametrize("shape", [(2, 100), (1, 1, 100), (1, 2, 0)])
def test_audio_of_another_layout_is_refused_with_its_shape(tiny_base, shape):
    with pytest.raises(ValueError, match=r"expected \(batch, 2"):
        tiny_base.encode_audio(torch.zeros(shape))


@given(
    length=st.integers(1, 700),
    left=st.integers(0, 150),
    right=st.integers(0, 40),
    heads=st.integers(1, 2),
)
@settings(max_examples=30, deadline=None)
def test_sliding_window_equals_the_masked_square(length, left, right, heads):
    q, k, v = torch.randn(3, 2, heads, length, 8, dtype=torch.float64)
    offset = torch.arange(length) - torch.arange(length)[:, None]
    band = (offset >= -left) & (offset <= right)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=band)
    ours = SlidingWindow(length, left, right, torch.device("cpu")).attend(q, k, v)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@given(frames=st.integers(1, 5000), phase=st.sampled_from([1, 2, 4]))
def test_windows_cover_every_frame_in_phase_with_context_at_inner_edges(frames, phase):
    found = list(windows(frames, phase, chunked=True))
    assert found[0].start == found[0].keep == 0
    assert found[-1].stop == frames
    for before, after in zip(found, found[1:], strict=False):
        assert after.start % phase == 0
        assert after.stop - after.start <= 128
        # Half the overlap on either side of the seam is context, and no frame is left out between them.
        assert after.keep - after.start == OVERLAP_FRAMES // 2
        assert before.stop - after.keep >= OVERLAP_FRAMES // 2


class LargestTensor(torch.overrides.TorchFunctionMode):
    """Counts the elements of the largest tensor any operation returns."""

    elements = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                # Storage, not shape: an expanded or overlapping view costs nothing.
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return out


@torch.no_grad()
def test_one_pass_grows_linearly_and_windows_not_at_all(autoencoder):
    def largest(encode, frames):
        audio = torch.randn(1, 2, frames * 32)
        with LargestTensor() as watch:
            encode(audio)
        return watch.elements

    assert largest(autoencoder.encode_once, 1200) <= 6 * largest(autoencoder.encode_once, 200)
    # In windows only the clip itself and its latents grow, and here they are the smaller part.
    assert largest(autoencoder.encode, 1200) == largest(autoencoder.encode, 600)
