"""Validation: which clips are held out, that its losses mean the same everywhere, and what is decided by them."""

import hashlib
import io
import json
import zipfile

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors import safe_open

from sa3dist import config, shard
from sa3dist.adapters import adapter_parameters, detach_adapter
from sa3dist.data.batches.micro_batch import SampleSettings
from sa3dist.errors import ConfigError
from sa3dist.formats import ClipEntry, dataset_digest
from sa3dist.model.compiled import compile_blocks
from sa3dist.pipeline import Run
from sa3dist.runtime.deepspeed_launch import FILE_VARIABLE, USE_VARIABLE
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from sa3dist.training import checkpoint
from sa3dist.training.metrics import RowsFile
from sa3dist.training.row_files import METRICS_NAME
from sa3dist.training.trainer import Trainer
from sa3dist.validation import fixed_set
from sa3dist.validation.fixed_set import FixedSet
from sa3dist.validation.observer import Validation
from sa3dist.validation.split import chosen_by_name, chosen_by_share, grouped, hold_out, source_of
from tests.helpers.adapter_base import move
from tests.helpers.clips import captioned, encode, tone, write_zip
from tests.helpers.forked_trainers import forked_ranks
from tests.helpers.golden import THREADS
from tests.helpers.program import STEPS, rows, run, short_run, status
from tests.helpers.ranks import run_ranks
from tests.helpers.same_runs import assert_same_training
from tests.helpers.trainers import make_settings
from tests.helpers.zero_ranks import import_deepspeed


def clip(key, audio=None):
    sha256 = hashlib.sha256((audio or key).encode()).hexdigest()
    return ClipEntry(key, "s.tar", 0, 10, sha256, "wav", 44100, 44100, 2, "a sound")


CLIPS = [clip(f"takes/t{number:02d}") for number in range(30)]


def test_a_share_holds_out_whole_groups_drawn_by_the_seed_alone():
    groups = grouped(CLIPS, [("takes/t00", "takes/t29"), ("takes/t29", "takes/t15")])
    assert ["takes/t00", "takes/t15", "takes/t29"] in groups
    assert sum(groups, []) != sorted(sum(groups, []))
    seen = {seed: chosen_by_share(groups, 0.2, seed) for seed in range(20)}
    assert {len(keys) for keys in seen.values()} == {6}
    assert all(len({"takes/t00", "takes/t15", "takes/t29"} & set(keys)) in (0, 3) for keys in seen.values())
    assert len({tuple(keys) for keys in seen.values()}) > 15
    assert all(chosen_by_share(groups[::-1], 0.2, seed) == keys for seed, keys in seen.items())


def test_of_a_small_set_one_file_is_held_out_and_the_smallest_group_where_none_is_alone():
    assert len(chosen_by_share([[f"c{n}"] for n in range(19)], 0.5, 1)) == 1
    assert chosen_by_share([["a", "b", "c"], ["d", "e"]], 0.1, 1) == ["d", "e"]


@pytest.mark.parametrize(
    ("key", "source"),
    [
        ("Song_part2", "song"),
        ("a/song-chunk003", "a/song"),
        ("a/song.seg 4", "a/song"),
        ("song_12", "song_12"),
        ("apart2", "apart2"),
        ("part2", "part2"),
    ],
)
def test_clips_cut_from_one_recording_are_known_by_the_words_of_their_names(key, source):
    assert source_of(key) == source


def test_equal_audio_and_cuts_of_one_recording_belong_together():
    clips = [clip("a_part1"), clip("a_part2"), clip("b", "same"), clip("c", "same"), clip("a"), clip("d")]
    assert grouped(clips, []) == [["a", "a_part1", "a_part2"], ["b", "c"], ["d"]]


def test_names_are_clips_files_or_folders_and_what_belongs_to_them_follows():
    groups = grouped(CLIPS, [("takes/t03", "takes/t07")])
    assert chosen_by_name(CLIPS, groups, ["takes/t03.wav"]) == ["takes/t03", "takes/t07"]
    assert chosen_by_name(CLIPS, groups, ["takes/t01", "takes/t02"]) == ["takes/t01", "takes/t02"]
    assert len(chosen_by_name(CLIPS, groups, ["takes/"])) == 30
    # As macOS stores it, and as it is typed.
    decomposed = [clip("cafe\u0301/t")]
    for name in ("caf\u00e9/t", "caf\u00e9/", "cafe\u0301/t.wav"):
        assert chosen_by_name(decomposed, [["cafe\u0301/t"]], [name]) == ["cafe\u0301/t"]
    with pytest.raises(ConfigError, match="validation: 'takes/t0l' is no clip, .*, did you mean 'takes/t"):
        chosen_by_name(CLIPS, groups, ["takes/t0l"])


@pytest.fixture
def alike(tmp_path):
    """A zip of 20 noises, one of which is there again at -3 dB as OGG, opened as a data set; and its settings."""
    rng = np.random.default_rng(3)
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:

        def store(name, audio_N, extension, **codec):
            held = io.BytesIO()
            soundfile.write(held, audio_N, 44100, format=extension.upper(), **codec)
            archive.writestr(f"{name}.{extension}", held.getvalue())
            archive.writestr(f"{name}.txt", "a noise")

        for number in range(20):
            pieces = [rng.standard_normal(4410) * rng.uniform(0.01, 0.2) for _ in range(20)]
            noise_N = np.convolve(np.concatenate(pieces), rng.standard_normal(24) / 5, "same").clip(-1, 1)
            store(f"n{number:02d}", noise_N, "flac")
            if number == 4:
                store("again", 0.708 * noise_N, "ogg", subtype="VORBIS")
    settings = make_settings(audio_data_url=str(tmp_path / "clips.zip"), work_dir=str(tmp_path / "work"))

    def split(**changes):
        changed = config.build(settings.model_dump() | changes)
        where = Group(0, 1, "cpu"), StopRequest()
        beside = shard.open_validation(changed, *where)
        return hold_out(changed, shard.open_dataset(changed, *where), *where, beside)

    return split


@pytest.mark.parametrize("order", [["again"], ["n04"]])
def test_near_duplicates_lie_on_one_side(alike, order):
    index, held_out = alike(validation=order)
    assert [clip.key for clip in held_out] == ["again", "n04"]
    assert len(index.clips) == 19
    assert index.digest == dataset_digest(index.clips)
    for seed in range(30):
        index, held_out = alike(validation=0.1, seed=seed)
        assert len(held_out) == 2
        assert len({"again", "n04"} & {clip.key for clip in held_out}) in (0, 2)


def test_a_source_of_its_own_is_held_out_whole_unless_it_has_a_clip_that_is_trained_on(alike, tmp_path):
    others = {f"n{number:02d}.flac": tone(seconds=1 + number) for number in range(3)}

    def source(name, **sounds):
        members = {key: encode(sound_NC, container="FLAC") for key, sound_NC in (others | sounds).items()}
        return str(write_zip(tmp_path / name, members | {f"{key[:-5]}.txt": b"a sound" for key in members}))

    index, held_out = alike(validation=source("apart.zip"))
    # Their names are those of clips that are trained on, which says nothing.
    assert [clip.key for clip in held_out] == ["n00", "n01", "n02"]
    assert len(index.clips) == 21
    with zipfile.ZipFile(tmp_path / "clips.zip") as archive:
        known_NC, _ = soundfile.read(io.BytesIO(archive.read("n07.flac")), dtype="float32", always_2d=True)
    with pytest.raises(ConfigError) as refusal:
        alike(validation=source("mixed.zip", **{"louder.flac": 0.9 * known_NC}))
    assert str(refusal.value) == (
        f"validation: 1 clip of {tmp_path / 'mixed.zip'} is trained on, or nearly equal to what is: louder (as n07); "
        f"take them out of one of the two"
    )


HELD_OUT = ["tone/tone_00", "noise"]
EVERY_3 = ["validation_every=3", "keep_best=true"]


FEWEST_CROPS = fixed_set.FEWEST_CROPS


@pytest.fixture(scope="module", autouse=True)
def _few_crops():
    """Fewer passes; of three clips an odd number for two ranks, and one too few for four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed_set, "FEWEST_CROPS", 3)
        yield


@pytest.fixture(scope="module")
def split_words(demo_clips, demo_base, demo_work):
    """Of a run with two of the eight clips held out."""
    return [*short_run(demo_clips, demo_base, demo_work), f"validation=[{','.join(HELD_OUT)}]"]


@pytest.fixture(scope="module")
def blind(split_words, tmp_path_factory):
    """The output directory of a run that evaluates nothing."""
    output_dir = tmp_path_factory.mktemp("blind") / "run"
    assert run(split_words, output_dir, "validation_every=0") == 0
    return output_dir


@pytest.fixture(scope="module")
def watched(split_words, tmp_path_factory):
    """The same with evaluations."""
    output_dir = tmp_path_factory.mktemp("watched") / "run"
    assert run(split_words, output_dir, *EVERY_3, "num_workers=1") == 0
    return output_dir


def evaluations(output_dir):
    return {row["step"]: row for row in rows(output_dir) if "val/loss" in row}


def trained(output_dir):
    return [row for row in rows(output_dir) if "loss" in row]


def test_evaluations_change_no_bit_of_the_training(blind, watched):
    assert_same_training(blind, watched)
    assert not evaluations(blind)


def test_clips_held_out_are_never_trained_on_and_are_named_beside_the_settings(watched):
    text = (watched / "run.yaml").read_text()
    listing = yaml.safe_load("\n".join(line[2:] for line in text.splitlines() if line.startswith("# ")))
    held_out = json.loads((watched / "config.json").read_text())["held_out_clips"]
    assert listing == {"held_out": held_out}
    assert "tone/tone_00" in held_out
    assert 1 < len(held_out) < 5
    seen = {key for row in trained(watched) for key in row["clips"]}
    assert seen
    assert not seen & set(held_out)
    assert config.build(config.read_file(str(watched / "run.yaml"))).validation == HELD_OUT


def test_a_row_has_the_losses_at_five_times_their_mean_and_its_distance_from_the_base(watched):
    found = evaluations(watched)
    assert list(found) == [0, 3, STEPS]
    for row in found.values():
        losses = [row[f"val/loss_{t}"] for t in (0.1, 0.3, 0.5, 0.7, 0.9)]
        assert len(set(losses)) == 5
        assert row["val/loss"] == pytest.approx(sum(losses) / 5, rel=1e-12)
        assert row["val/gain"] == row["val/loss"] - found[0]["val/loss"]
    assert found[0]["val/gain"] == 0
    assert found[3]["val/gain"] != 0
    assert {row["step"] for row in trained(watched) if "validation_seconds" in row} == {1, *list(found)[1:]}


def test_a_run_that_is_continued_has_the_same_rows_and_does_not_evaluate_the_base_again(watched, split_words, tmp_path):
    for steps in (3, STEPS):
        assert run(split_words, tmp_path / "run", *EVERY_3, f"number_of_steps={steps}") == 0
    assert [row for row in rows(tmp_path / "run") if "val/loss" in row] == list(evaluations(watched).values())


def test_the_first_row_of_a_continued_run_says_after_which_step_whatever_it_is_of(split_words, tmp_path):
    for steps in (2, STEPS):
        assert run(split_words, tmp_path / "run", *EVERY_3, "log_every=10", f"number_of_steps={steps}") == 0
    new = [row for row in rows(tmp_path / "run") if row["step"] > 2]
    # An evaluation after step 3, then the last step's row, behind another evaluation.
    assert [row.get("resumed_from") for row in new] == [2, 2, 2]


def test_a_source_of_its_own_is_evaluated_named_and_part_of_the_run(demo_clips, demo_base, demo_work, tmp_path, capsys):
    words, output_dir = short_run(demo_clips, demo_base, demo_work), tmp_path / "run"
    for name in ("one", "other"):
        members = captioned(3, folder=f"{name}/", seconds=0.4 if name == "one" else 0.7)
        write_zip(tmp_path / f"{name}.zip", members)
    assert run(words, output_dir, f"validation={tmp_path}/one.zip", *EVERY_3, "log_clips=true") == 0
    assert list(evaluations(output_dir)) == [0, 3, STEPS]
    described, text = (json.loads((output_dir / "config.json").read_text()), (output_dir / "run.yaml").read_text())
    assert described["held_out_clips"] == [f"one/clip{number}" for number in range(3)]
    # All of the first one are trained on.
    assert described["dataset_clips"] == 8
    assert all(f"# - one/clip{number}\n" in text for number in range(3))
    for source, said in (
        ("other.zip", "holds a checkpoint with held_out '3 clips ("),
        ("gone.zip", f"validation: {tmp_path}/gone.zip: no such file or folder"),
    ):
        assert run(words, output_dir, f"validation={tmp_path}/{source}", *EVERY_3) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_another_split_is_refused_in_one_line(watched, split_words, capsys):
    for other in ("validation=[tone/tone_00]", "validation=0"):
        assert run(split_words, watched, *EVERY_3[:1], other) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "holds a checkpoint with held_out" in line
        assert "this run has" in line


@pytest.fixture
def prepared(split_words, tmp_path):
    """A trainer whose adapters are moved, and its data set, before the first step."""
    values = config.read_arguments([*split_words, "output_dir=" + str(tmp_path / "run"), "validation_every=1"])
    made = Run(config.build(values), Group(0, 1, torch.device("cpu")), StopRequest())
    base = made.open_base()
    source = made.encode(base, made.shard())
    move(base)
    made.prepare(base, source)
    made.settings.output_dir.mkdir()
    return made.trainer, source


def test_losses_are_the_same_on_1_2_and_4_ranks(prepared):
    trainer, source = prepared
    base, settings, plan = trainer.base, trainer.settings, trainer.plan

    def work(group):
        of_rank = Trainer(base, adapter_parameters(base), settings, plan, group)
        validation = Validation(of_rank, source)
        found = [validation.begin(StopRequest()).row, validation.after_step(1, StopRequest()).row]
        assert found[0].pop("validation_set") == FixedSet(source).digest
        return found

    alone = work(Group(0, 1, torch.device("cpu")))
    assert abs(alone[1]["val/gain"]) > 1e-3
    for world_size in (2, 4):
        for of_rank in run_ranks(world_size, work):
            for row, expected in zip(of_rank, alone, strict=True):
                assert row == pytest.approx(expected, rel=0, abs=1e-6)


def test_formed_weights_and_compiled_blocks_are_evaluated_as_what_they_stand_for(prepared):
    trainer, source = prepared
    plain = Validation(trainer, source)
    expected = [plain.begin(StopRequest()).row, plain.after_step(1, StopRequest()).row]
    settings = trainer.settings.model_copy(update={"adapter_products": "formed"})
    formed = Trainer(trainer.base, adapter_parameters(trainer.base), settings, trainer.plan, trainer.group)
    # What they were formed from is of before: an evaluation comes behind a step, and forms them again.
    assert formed.engine.formed is not None
    compile_blocks(trainer.base.dit, "eager")
    compiled = trainer.base.dit.transformer.run_block
    there = Validation(formed, source)
    found = [there.begin(StopRequest()).row, there.after_step(1, StopRequest()).row]
    assert trainer.base.dit.transformer.run_block is compiled
    for row, wanted in zip(found, expected, strict=True):
        assert row.pop("validation_set", None) == wanted.pop("validation_set", None)
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert abs(found[1]["val/gain"]) > 1e-3


def test_the_base_is_evaluated_whatever_the_adapters_hold_and_as_the_loss_defines_it(prepared):
    trainer, source = prepared
    row = Validation(trainer, source).begin(StopRequest()).row
    detach_adapter(trainer.base)
    losses = []
    for crop in (fixed := FixedSet(source)).crops:
        for batch in fixed.batches(crop):
            hidden, mask = trainer.base.embed_prompts(batch.hidden_BLH, batch.prompt_mask_BL), batch.prompt_mask_BL
            # With the rest of the prompt's padding, and each value of the flow from its definition.
            with torch.no_grad():
                found = trainer.base.velocity(
                    batch.noised_BDT, batch.t_B, hidden, mask, batch.seconds_total_B, prompt_length=batch.prompt_length
                )
            noise = batch.target_BDT + batch.latents_BDT
            t = float(batch.t_B)
            torch.testing.assert_close(batch.noised_BDT, (1 - t) * batch.latents_BDT + t * noise)
            losses.append(float((found.double() - batch.target_BDT.double()).square().mean()))
    assert row["val/loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_what_a_signal_has_stopped_is_evaluated_when_the_run_goes_on(prepared):
    trainer, source = prepared
    stop = StopRequest()
    stop.hear("SIGTERM on rank 1")
    validation = Validation(trainer, source)
    assert validation.begin(stop).row == {}
    assert {layer.strength for layer in trainer.layers} == {1.0}
    rows_file = RowsFile(trainer.settings.output_dir / METRICS_NAME, None)
    rows_file.write({"step": 0, **Validation(trainer, source).begin(StopRequest()).row})
    trainer.step = 2
    missed = Validation(trainer, source).begin(StopRequest())
    assert missed.step == 2
    rows_file.write({"step": 2, **missed.row})
    assert Validation(trainer, source).begin(StopRequest()).row == {}


@pytest.mark.slow
def test_zero_3_gives_the_same_numbers_previews_and_health(split_words, tmp_path, monkeypatch):
    import_deepspeed()
    if THREADS > 1:
        # The product's own, which ranks have that are not forked from this process.
        monkeypatch.setattr(fixed_set, "FEWEST_CROPS", FEWEST_CROPS)
    words = [*split_words, "deterministic=false", "global_batch_size=2", "number_of_steps=1", *EVERY_3]
    # Three of them: one rank makes one twice.
    words += ["preview_every=1", "preview_seconds=0.6", "preview_steps=2", "preview_prompts=[a, b, c]"]
    assert run(words, tmp_path / "alone") == 0
    # Everything divided, nothing kept whole.
    divided = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100000}
    (tmp_path / "divided.json").write_text(json.dumps({"zero_optimization": divided}))
    asked = {USE_VARIABLE: "true", FILE_VARIABLE: str(tmp_path / "divided.json")}
    two = [*words, f"output_dir={tmp_path}/two", "adapter_products=per_use", "gradient_checkpointing=auto"]
    with forked_ranks(two, two, log=tmp_path / "said", **asked) as ranks:
        assert [rank.wait(500) for rank in ranks] == [0, 0], ranks[0].said()
    expected, found = evaluations(tmp_path / "alone"), evaluations(tmp_path / "two")
    assert expected.keys() == found.keys() == {0, 1}
    assert expected[0].pop("validation_set") == found[0].pop("validation_set")
    for step, row in expected.items():
        assert found[step] == pytest.approx(row, rel=0, abs=1e-6)
    assert json.loads((tmp_path / "two/best.json").read_text())["step"] == 1
    healthy, same = (
        json.loads((tmp_path / output_dir / "health.jsonl").read_text()) for output_dir in ("alone", "two")
    )
    for part in ("drift", "update_ratio", "effective_rank"):
        assert same[part] == pytest.approx(healthy[part], rel=1e-4)
    assert [layer["name"] for layer in same["layers"]] == [layer["name"] for layer in healthy["layers"]]
    for step in (0, 1):
        for number in range(3):
            name = f"previews/step-{step:08d}/{number}.flac"
            one, other = (soundfile.read(tmp_path / output_dir / name)[0] for output_dir in ("alone", "two"))
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-5)
    assert "previews of step" not in ranks[0].said() + ranks[1].said()


# The base, then by step.
CURVE = [1.0, 0.9, 0.7, 0.5, 0.6, 0.8, 0.7, 0.55, 0.45]


def test_the_best_step_is_kept_and_what_gets_no_better_ends(split_words, tmp_path, monkeypatch, caplog):
    # Planted where the forward passes are: everything that is decided by them is real.
    monkeypatch.setattr(Validation, "_mean_losses", lambda self, step, stop: [CURVE[step]] * 5)
    output_dir = tmp_path / "run"
    words = ["validation_every=1", "keep_best=true", "number_of_steps=8", "log_every=5", "save_every=1"]

    def best():
        value = json.loads((output_dir / "best.json").read_text())
        with safe_open(output_dir / "lora.best.safetensors", "pt") as file:
            assert file.metadata()["step"] == str(value["step"])
            assert json.loads(file.metadata()["lora_config"])["rank"] == 4
            tensors = {name: file.get_tensor(name) for name in dict.fromkeys(file.keys())}
        saved = checkpoint.load(checkpoint.path_of(output_dir, value["step"])).adapters
        assert tensors.keys() == saved.keys()
        assert all(torch.equal(tensors[name], saved[name].half()) for name in tensors)
        return value

    for _ in range(2):
        # The second time everything is there, and it ends at once.
        assert run(split_words, output_dir, *words, "keep_checkpoints=9", "early_stop=3") == 0
        assert best() == {"step": 3, "val/loss": 0.5}
        assert list(evaluations(output_dir)) == list(range(7))
        assert [row["step"] for row in trained(output_dir)] == [5, 6]
        reason = json.loads((output_dir / "result.json").read_text())["ended_early"]
        assert reason == "early_stop: 3 evaluations without a lower validation loss than 0.5000, after step 3"
        assert f"ends after step 6: {reason}" in caplog.text
        assert status(output_dir)["step"] == 6
    assert run(split_words, output_dir, *words, "keep_checkpoints=9", "number_of_steps=7") == 0
    assert best() == {"step": 3, "val/loss": 0.5}
    assert run(split_words, output_dir, *words, "keep_checkpoints=9") == 0
    assert best() == {"step": 8, "val/loss": 0.45}
    assert "ended_early" not in json.loads((output_dir / "result.json").read_text())
    assert run(split_words, output_dir, *words, "number_of_steps=1", "resume=never") == 0
    assert best() == {"step": 1, "val/loss": 0.9}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 0.6}, "validation: '0.6' is not valid, expected a share of the clips up to 0.5"),
        ({"validation": {}}, "validation: '{}' is not valid, expected a share"),
        ({"validation": ["a", ""]}, "validation: expected names"),
        ({"keep_best": True}, "keep_best: needs validation"),
        ({"early_stop": 2, "validation": 0.1, "validation_every": 0}, "early_stop: needs validation"),
        ({"validation": 0.1, "mode": "streaming", "duration": 2}, "validation: with mode: streaming it needs an index"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError) as refusal:
        make_settings(**changes)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


def test_a_share_is_read_from_words_and_files_alike_and_off_is_off(tmp_path):
    assert config.build(config.read_arguments(["audio_data_url=a", "validation=0.1"])).validation == 0.1
    assert config.build(config.read_arguments(["audio_data_url=a", "validation=[a, b/c]"])).validation == ["a", "b/c"]
    (tmp_path / "c.yaml").write_text("audio_data_url: a\nvalidation: off\n")
    assert config.build(config.read_file(str(tmp_path / "c.yaml"))).validation == 0


def test_a_few_clips_give_many_crops_and_many_clips_not_all():
    class Held:
        held_encoded = None

        def __init__(self, count, seed=42):
            self.draws = SampleSettings(seed, 4, 10, 0.1, "file", None)
            self.held_out = [clip(f"c{number}") for number in range(count)]

    few, many = FixedSet(Held(2)), FixedSet(Held(200))
    assert [crop.slot for crop in few.crops] == [0, 1, 2]
    assert len({crop.clip.key for crop in few.crops}) == 2
    assert len({crop.clip.key for crop in many.crops}) == 32
    assert FixedSet(Held(2)).digest == few.digest != FixedSet(Held(2, seed=1)).digest
    assert [crop.slot for crop in few.of_ranks(5)] == [0, 1, 2, 0, 1]
