"""`base.generate` and `sa3dist generate`: the reference's layout, any strength, files that are never overwritten."""

import json
import math

import pytest
import soundfile
import torch

import sa3dist
from sa3dist import cli
from sa3dist.adapters import adapted_layers, detach_adapter, formed_once, load_adapter, set_strength
from sa3dist.adapters.layers import AdaptedLayer
from sa3dist.errors import EnvironmentFailure
from sa3dist.flow import draw_noise, generator_for
from sa3dist.listening.audio_files import FORMATS, write_audio
from sa3dist.model.generation import Generation
from sa3dist.model.sampling import Guidance, combine, logsnr_schedule
from tests.helpers.adapter_files import make_adapter

SHORT = {"seconds": 0.7, "steps": 3, "cfg_scale": 4.0}
PROMPTS = ["a bass drum", "", "rain on a tin roof, slow and far"]


@pytest.fixture
def base(demo_base):
    return sa3dist.load_base(demo_base, encoder=False)


@pytest.fixture(scope="module")
def adapters(demo_base, tmp_path_factory):
    """Two adapter files of types with magnitudes, moved far enough to be heard."""
    base, folder = sa3dist.load_base(demo_base, encoder=False), tmp_path_factory.mktemp("adapters")
    rows = make_adapter(base, folder / "rows.safetensors", 1, adapter_type="dora-rows", rank=4)
    return rows, make_adapter(base, folder / "both.safetensors", 2, adapter_type="bora", rank=2)


def near(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def as_the_reference_does(base, prompt, number, seed):
    """One clip by the specification's formulas, over the reference's own padded layout and with its mask."""
    rate, size = base.sample_rate_hz, base.samples_per_frame
    samples = int((SHORT["seconds"] + 6) * rate)
    frames = 2 * math.ceil(math.ceil(samples / size) / 2)
    valid = math.ceil(int(SHORT["seconds"] * rate) / size) + int(6 * rate / size)
    keep_BT = (torch.arange(frames) < valid)[None]
    embeds, mask = base.encode_prompts([prompt])
    x = draw_noise(frames, base.latent_channels, generator_for(seed, "generate", number, 0))[None]
    times = logsnr_schedule(SHORT["steps"])
    with torch.no_grad():
        for now, then in zip(times[:-1], times[1:], strict=True):
            t_B, seconds_B = now[None], torch.tensor([SHORT["seconds"]])
            cond, null = (
                base.velocity(x, t_B, embeds, mask, seconds_B, keep_BT, drop_cross_B=torch.tensor([drop]))
                for drop in (False, True)
            )
            x = x + (then - now) * combine(cond, null, x, t_B, Guidance(SHORT["cfg_scale"]), keep_BT)
    audio = base.decode_latents(x) * keep_BT[:, None].float().repeat_interleave(size, dim=2)
    return audio.clamp(-1, 1)[0, :, : int(SHORT["seconds"] * rate)], frames - valid


@pytest.mark.parametrize("shape", ["medium", "small"])
def test_generated_clips_are_those_of_the_references_padded_layout(shape, tmp_path):
    base = sa3dist.load_base(sa3dist.write_tiny_base(tmp_path, shape), encoder=False)
    found = base.generate(PROMPTS[:2], **SHORT, seed=5)
    for number, prompt in enumerate(PROMPTS[:2]):
        expected, padded = as_the_reference_does(base, prompt, number, seed=5)
        assert padded > 0
        assert expected.abs().max() > 0.01
        near(found[number], expected)


def test_a_clip_is_the_same_whatever_is_generated_beside_it(base):
    together = base.generate(PROMPTS * 2, **SHORT)
    assert together.shape == (6, 2, int(0.7 * base.sample_rate_hz))
    near(together[0], together[0].clamp(-1, 1), 0)
    ((number, alone),) = Generation(**SHORT).clips(base, [(4, PROMPTS[1])])
    assert number == 4
    near(together[4], alone)
    # Another number is another noise, and so is another seed.
    assert (together[4] - together[1]).abs().max() > 1e-3
    assert (base.generate(PROMPTS[:1], **SHORT, seed=1)[0] - together[0]).abs().max() > 1e-3


@pytest.mark.parametrize("prompts", ["a bass drum", []])
def test_prompts_are_a_list_of_at_least_one(base, prompts):
    with pytest.raises(ValueError, match="expected a list of at least one string"):
        base.generate(prompts, **SHORT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_strength_0_an_adapter_leaves_the_base_bit_for_bit(demo_base, adapters, dtype):
    base = sa3dist.load_base(demo_base, dtype=dtype, encoder=False)
    plain = base.generate(PROMPTS[:1], **SHORT)
    for path in adapters:
        load_adapter(base, path, strength=0)
        assert torch.equal(base.generate(PROMPTS[:1], **SHORT), plain)
        set_strength(base, 1)
        assert (base.generate(PROMPTS[:1], **SHORT) - plain).abs().max() > 1e-3
        detach_adapter(base)
        assert torch.equal(base.generate(PROMPTS[:1], **SHORT), plain)


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.5])
def test_weights_are_formed_once_at_the_strength_set_last(base, adapters, monkeypatch, strength):
    load_adapter(base, adapters[1])
    set_strength(base, strength)
    # Without forming, layers multiply with base and factors apart.
    ((_, factored),) = Generation(**SHORT).clips(base, [(0, PROMPTS[0])])
    calls, form = [], AdaptedLayer.effective_weight

    def counted(layer, weight):
        calls.append(layer)
        return form(layer, weight)

    monkeypatch.setattr(AdaptedLayer, "effective_weight", counted)
    found = base.generate(PROMPTS[:1], **SHORT)[0]
    assert calls == list(adapted_layers(base).values())
    near(found, factored, 1e-4)
    assert all(layer.fixed_weight is None for layer in calls)


def test_formed_weights_go_when_generating_fails(base, adapters):
    load_adapter(base, adapters[0])
    with pytest.raises(RuntimeError, match="stop"), formed_once(base):
        raise RuntimeError("stop")
    assert all(layer.fixed_weight is None for layer in adapted_layers(base).values())


def generate(*words) -> int:
    return cli.main(["generate", *map(str, words), "--seconds", "0.7", "--steps", "3", "--cfg", "4"])


def heard(path):
    return torch.from_numpy(soundfile.read(path, dtype="float32", always_2d=True)[0].T)


def test_the_command_writes_the_clips_and_what_they_are(demo_base, base, adapters, tmp_path, capsys):
    out = tmp_path / "new/clips"
    words = "--adapter", f"{adapters[0]}=0.5", "--prompt", *PROMPTS[:2], "--seed", 3, "--output", out
    assert generate(*words) == 0
    assert sorted(path.name for path in out.iterdir()) == ["0.flac", "0.json", "1.flac", "1.json"]
    load_adapter(base, adapters[0], strength=0.5)
    expected = base.generate(PROMPTS[:2], **SHORT, seed=3)
    for number in range(2):
        near(heard(out / f"{number}.flac"), expected[number])
        about = json.loads((out / f"{number}.json").read_text())
        assert about["prompt"] == PROMPTS[number]
        assert {key: about[key] for key in ("seconds", "steps", "cfg_scale", "seed")} == {**SHORT, "seed": 3}
        assert (about["model"], about["adapters"][0]["strength"]) == (str(demo_base), 0.5)
    # The same command again has nothing to do; where a file is missing it writes that one alone.
    before = (out / "0.flac").stat().st_mtime_ns
    (out / "1.flac").unlink()
    assert generate(*words) == 0
    assert "1 of 2 clips" in capsys.readouterr().out.splitlines()[-1]
    assert (out / "0.flac").stat().st_mtime_ns == before
    near(heard(out / "1.flac"), expected[1])
    # Another precision is another request.
    assert generate(*words, "--precision", "bf16") == 2
    assert "exists already, of another request" in capsys.readouterr().err


def test_files_at_strength_0_are_the_bases_own(demo_base, adapters, tmp_path):
    model = "--model", demo_base, "--prompt", PROMPTS[0], "--output"
    assert generate(*model, tmp_path / "base") == 0
    assert generate("--adapter", f"{adapters[0]}=0", f"{adapters[1]}=0", *model, tmp_path / "off") == 0
    assert (tmp_path / "base/0.flac").read_bytes() == (tmp_path / "off/0.flac").read_bytes()


def test_several_adapters_act_on_one_anothers_result(demo_base, base, adapters, tmp_path):
    words = "--prompt", PROMPTS[0], "--output", tmp_path / "chain"
    before = (demo_base / "model.safetensors").read_bytes()
    assert generate("--adapter", f"{adapters[0]}=0.6", adapters[1], *words) == 0
    # The weights are changed in memory alone.
    assert (demo_base / "model.safetensors").read_bytes() == before
    # The specification's W -> f0(W) -> f1(f0(W)), every f with its own magnitudes.
    for path, strength in ((adapters[0], 0.6), (adapters[1], 1.0)):
        load_adapter(base, path, strength)
        made = {name: layer.effective_weight(layer.weight) for name, layer in adapted_layers(base).items()}
        detach_adapter(base)
        with torch.no_grad():
            for root in base.adapter_roots:
                for name, module in root.named_modules():
                    if name in made:
                        module.weight.copy_(made[name])
    near(heard(tmp_path / "chain/0.flac"), base.generate(PROMPTS[:1], **SHORT)[0])


@pytest.mark.parametrize("suffix", ["wav", "mp3", "ogg"])
def test_other_formats_hold_the_same_sound(demo_base, base, tmp_path, suffix):
    assert generate("--model", demo_base, "--prompt", "x", "--format", suffix, "--output", tmp_path) == 0
    info, (expected,) = soundfile.info(tmp_path / f"0.{suffix}"), base.generate(["x"], **SHORT)
    assert (info.format, info.subtype, info.samplerate, info.channels) == (*FORMATS[suffix], base.sample_rate_hz, 2)
    found = heard(tmp_path / f"0.{suffix}")[:, : expected.shape[1]]
    if suffix == "wav":
        near(found, expected, 2**-22)
    else:
        # What a random model makes is nearly noise, of which these codecs leave out the most.
        assert found.shape[1] > 0.95 * expected.shape[1]
        expected = expected[:, : found.shape[1]]
        assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.7


@pytest.mark.parametrize("suffix", list(FORMATS))
def test_audio_that_is_not_finite_is_no_file_and_says_why(tmp_path, suffix):
    with pytest.raises(EnvironmentFailure, match=f"0.{suffix}: the audio is not finite"):
        write_audio(tmp_path / f"0.{suffix}", torch.tensor([[0.1, math.nan, 0.2]] * 2), 44100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seconds", "0"], "seconds: 0.0 is out of range"),
        (["--seconds", "nan"], "seconds: nan is out of range"),
        (["--seconds", "9999"], "this model makes up to 380.4 s"),
        (["--steps", "0"], "steps: 0 is out of range"),
        (["--steps", "99999999"], "steps: 99999999 is out of range, expected 1 to 20000"),
        (["--steps", "two"], "argument --steps: invalid int value: 'two'"),
        (["--cfg", "inf"], "cfg_scale: inf is out of range"),
        (["--cfg", "nan"], "cfg_scale: nan is out of range"),
        (["--cfg=-1e300"], "cfg_scale: -1e+300 is out of range, expected a number up to 1000"),
        (["--adapter", "{adapter}=1e300"], "the weight '1e300' is not a number up to 1000000"),
        (["--adapter", "nowhere.safetensors"], "nowhere.safetensors: cannot be read"),
        (["--adapter", "{adapter}=loud"], "the weight 'loud' is not a number"),
        (["--model", "no-such-base"], "no such directory"),
        (["--model", ""], "--model: is needed"),
        (["--prompt", "\udce9"], "not UTF-8"),
        (["--output", "{adapter}"], "is a file, expected a folder"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(demo_base, adapters, tmp_path, capsys, words, said):
    out = tmp_path / "out"
    given = ["--model", demo_base, "--prompt", "x", "--seconds", "0.7", "--output", out, *words]
    code = cli.main(["generate", *(str(word).format(adapter=adapters[0]) for word in given)])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert said in error
    assert not out.exists()


def test_files_of_another_request_are_not_overwritten(demo_base, tmp_path, capsys):
    (tmp_path / "1.flac").write_bytes(b"mine")
    assert generate("--model", demo_base, "--prompt", "x", "y", "--output", tmp_path) == 2
    assert "1.flac exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["1.flac"]


def test_a_prompt_that_the_text_encoder_cuts_is_named(demo_base, tmp_path, capsys):
    assert generate("--model", demo_base, "--prompt", "short", "word " * 200, "--output", tmp_path) == 0
    said = capsys.readouterr().err
    assert "1 caption is longer than the 128 tokens" in said
    assert "prompt 1 has " in said


def test_too_little_memory_on_the_device_is_said_in_one_line(demo_base, tmp_path, capsys, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Generation, "clips", out_of_memory)
    assert generate("--model", demo_base, "--prompt", "x", "--output", tmp_path) == 70
    assert capsys.readouterr().err.splitlines() == [
        "out of memory; fewer --seconds, a narrower --precision or --device cpu may fit"
    ]


def test_without_a_model_or_an_adapter_that_names_one_it_is_asked_for(tmp_path, capsys):
    assert generate("--prompt", "x", "--output", tmp_path) == 2
    assert capsys.readouterr().err.startswith("--model: is needed")
