"""Words of the command line and values in YAML: text stays as typed, and homes are found as a shell finds them."""

import io
import json
import os
import pwd
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from sa3dist import cli, config, supervise, train
from sa3dist.errors import ConfigError
from sa3dist.settings import PLACES, Settings

# Every one of them is something else to YAML 1.1, a comment or a mapping to any YAML, or looks like a file's name.
AS_TYPED = [
    *("1.10", "20251126_01", "007", "12:30:00", "2025-11-26", "on", "No", "0x1F", "1e3", ".5", "+1", "0b1", "1_000"),
    *("drums #2", "#", "# 1", "Artist: Title", "a: b: c", "'quoted'", '"quoted"', "[a, b]", "{a: b}", "*x", "&x", "!x"),
    *(
        "%a",
        "@a",
        "`a`",
        "| a",
        "> a",
        "- a",
        "? a",
        "key=value",
        "a=b=c",
        " padded ",
        "true",
        "<<",
        "=",
        "Über",
        "x" * 255,
    ),
]


def of(*words, **more):
    return config.build(
        config.read_arguments(["audio_data_url=clips.zip", *words, *(f"{k}={v}" for k, v in more.items())])
    )


@pytest.mark.parametrize("text", AS_TYPED)
def test_text_and_paths_of_the_command_line_are_taken_as_typed(text):
    assert of(name=text).name == text
    for field in PLACES:
        assert str(getattr(of(**{field: text}), field)) == text


@pytest.mark.parametrize("text", AS_TYPED)
def test_quoted_text_in_yaml_is_taken_as_it_is(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"audio_data_url: x\nname: {json.dumps(text, ensure_ascii=False)}\n", encoding="utf-8")
    assert config.build(config.read_file(str(path))).name == text


@pytest.mark.parametrize(
    "text", ["1.10", "20251126_01", "007", "12:30:00", "2025-11-26", "on", "No", "0x1F", "1e3", "+1"]
)
def test_unquoted_scalars_of_text_fields_in_yaml_are_their_own_spelling(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"audio_data_url: {text}\nname: {text} # a comment\noutput_dir: {text}\ninclude: [{text}, ff]\n")
    made = config.build(config.read_file(str(path)))
    assert (made.audio_data_url, made.name, str(made.output_dir), made.include) == (text, text, text, [text, "ff"])


@pytest.mark.parametrize(
    ("word", "value"),
    [
        *(("seed=0123", 123), ("seed=+7", 7), ("seed=1_000", 1000), ("duration=010", 10.0), ("duration=1_0", 10.0)),
        *(("learning_rate=1e-4", 1e-4), ("learning_rate=.5", 0.5), ("max_wall_time=12:30:00", 45000.0)),
        *(("max_wall_time=1-00:00:00", 86400.0), ("max_wall_time=090", 90.0)),
        *(("pre_encode=true", True), ("pre_encode=False", False), ("pre_encode=yes", True), ("pre_encode=off", False)),
        *(("compile=on", "on"), ("compile=false", "off"), ("mixed_precision=no", "no"), ("mixed_precision=off", "no")),
        *(
            ("include=[a,b]", ["a", "b"]),
            ("include=['a', \"b\"]", ["a", "b"]),
            ("include=a", ["a"]),
            ("include=[]", None),
        ),
        *(("include=[layers.[0-11].]", ["layers.[0-11]."]), ("include=layers.[0-11].", ["layers.[0-11]."])),
        *(("include=[layers.[0-1].ff, [2-3].x,]", ["layers.[0-1].ff", "[2-3].x"]), ("include=[1.10]", ["1.10"])),
        *(
            ("include=[0-1].[2-3]", ["[0-1].[2-3]"]),
            ("include=null", None),
            ("include=", None),
            ("duration=null", None),
        ),
        *(("lora_checkpoint_url=null", None), ("text_encoder=", None), ("work_dir=null", Path("runs/sa3dist-work"))),
        *(("output_dir=", Path("runs/sa3dist-lora")), ("name=null", "null")),
    ],
)
def test_numbers_are_decimal_and_lists_switches_and_null_as_documented(word, value):
    found = getattr(of(word), word.partition("=")[0])
    assert found == value
    assert type(found) is type(value) or isinstance(value, Path)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed=0x10", "^seed: '0x10' is not valid, expected a whole number"),
        ("seed=12:30", "^seed: '12:30' is not valid"),
        ("rank=1e1", "^rank: '1e1' is not valid"),
        ("duration=1:30", "^duration: '1:30' is not valid, expected a number"),
        ("pre_encode=maybe", "^pre_encode: 'maybe' is not valid, expected true or false"),
        ("rank=", "^rank: is empty"),
        ("audio_data_url=", "^audio_data_url: is empty"),
        ("include=[a,,b]", "^include: an empty pattern matches every layer"),
        ("name=" + "x" * 300, "^name: has a part that is no file name: at most 255 bytes"),
        ("output_dir=/" + "x" * 300, "^output_dir: has a part that is no file name"),
        ("seed=" + "9" * 5000, "^seed: '9{199}\\.\\.\\. is not valid"),
    ],
)
def test_what_a_field_cannot_be_is_one_short_line(word, message):
    with pytest.raises(ConfigError, match=message) as caught:
        of(word)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_value_is_never_looked_for_as_a_config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rank=4").write_text("rank: 8\n")
    Path("name=x.yaml").write_text("rank: 8\n")
    opened = []
    monkeypatch.setattr(config, "read_file", lambda path: opened.append(path) or {})
    assert of("rank=4", "name=x.yaml", f"lora_checkpoint_url={'x' * 5000}").rank == 4
    assert not opened
    # A config may be called like this all the same.
    for word in ("./rank=4", "runs/lr=1e-4.yaml", "a.yaml"):
        config.read_arguments([word])
    assert opened == ["./rank=4", "runs/lr=1e-4.yaml", "a.yaml"]


def test_a_config_whose_name_holds_an_equals_sign_is_read_where_no_field_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lr=3.yaml").write_text("rank: 8\n")
    assert config.read_arguments(["lr=3.yaml"]) == {"rank": 8}
    with pytest.raises(ConfigError, match="^lr: unknown key, did you mean learning_rate"):
        of("lr=4.yaml")


@pytest.mark.parametrize("line", ["audio_data_url: packs/Loops #1", "output_dir: #1", "name: take #2 of 3"])
def test_text_before_a_doubtful_comment_is_refused(line, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"rank: 4 #a comment all the same\n{line}\n")
    with pytest.raises(
        ConfigError, match=f"^{path}: line 2: '#.*' behind {line.partition(':')[0]} may be part of it"
    ) as caught:
        config.read_file(str(path))
    assert "\n" not in str(caught.value)
    path.write_text(f"{line.replace('#', '# ')}\nrank: 0123\n")
    assert config.read_file(str(path))["rank"] == 123


def test_json_says_itself_what_is_text_and_what_a_number(tmp_path):
    path = tmp_path / "REQUEST.JSON"
    values = {
        "audio_data_url": "a",
        "name": "1.10",
        "rank": 8,
        "pre_encode": True,
        "compile": True,
        "include": ["1.10"],
    }
    path.write_text(json.dumps(values))
    made = config.build(config.read_arguments([str(path)]))
    assert (made.name, made.rank, made.pre_encode, made.compile, made.include) == ("1.10", 8, True, "on", ["1.10"])
    path.write_text(json.dumps({"audio_data_url": "a", "name": 1.10}))
    values = config.read_arguments([str(path)])
    assert (config.build(values).name, config.output_dir_of(values)) == ("1.1", Path("runs/1.1"))


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_what_print_config_prints_reads_back_as_it_was(text):
    made = of(name=f"a{text}", audio_data_url=f"/{text}", include=f"x{text}")
    printed = yaml.safe_dump(made.as_dict(), sort_keys=False)
    path = Path("/proc/self/fd")
    with open(os.memfd_create("run"), "w+", encoding="utf-8", newline="") as file:
        file.write(printed)
        file.flush()
        again = config.build(config.read_file(str(path / str(file.fileno()))))
    assert again == made
    assert made.name == f"a{text}"


def test_print_config_on_the_command_line_gives_a_config_of_the_same_settings(tmp_path):
    words = [
        "audio_data_url=packs/Loops #1",
        "name=1.10",
        "output_dir=2025-11-26",
        "seed=0123",
        "max_wall_time=12:30:00",
    ]
    out = io.StringIO()
    with redirect_stdout(out):
        assert train.main([*words, "--print-config"]) == 0
    (tmp_path / "run.yaml").write_text(out.getvalue())
    assert config.build(config.read_file(str(tmp_path / "run.yaml"))) == config.build(config.read_arguments(words))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize("field", PLACES)
def test_home_is_expanded_in_every_field_that_names_a_place(field, home, tmp_path):
    user = pwd.getpwuid(os.getuid())
    path = tmp_path / "run.yaml"
    path.write_text(f"{field}: ~/x\n")
    assert str(getattr(of(f"{field}=~/x"), field)) == f"{home}/x"
    assert str(getattr(of(f"{field}=~"), field)) == str(home)
    assert str(getattr(config.build(config.read_arguments(["audio_data_url=x", str(path)])), field)) == f"{home}/x"
    assert str(getattr(of(f"{field}=~{user.pw_name}/x"), field)) == f"{user.pw_dir}/x"
    assert str(getattr(of(f"{field}=a/~/x"), field)) == "a/~/x"


@pytest.mark.parametrize("field", PLACES)
def test_an_unknown_user_is_one_line(field, home, capfd):
    assert train.main(["audio_data_url=x", f"{field}=~nosuchuser/x"]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"{field}: ~nosuchuser/x: no user nosuchuser on this machine")
    assert said.count("\n") == 1
    assert not list(home.parent.glob("~*"))


def test_a_file_of_that_very_name_is_taken_as_a_shell_takes_it(home):
    Path("~backup.zip").write_text("")
    assert of("audio_data_url=~backup.zip").audio_data_url == "~backup.zip"


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "~nosuchuser/a.safetensors", "--output", "x.safetensors"],
        ["merge", "a.safetensors=0.5", "--output=~nosuchuser/x"],
        ["merge", "~/a.safetensors", "--base=~nosuchuser/b", "--output=x"],
        ["export", "~nosuchuser/a.safetensors", "--format=comfy"],
        ["export", "--output=~nosuchuser/x", "--format=comfy", "~/a.safetensors"],
        ["export", "~nosuchuser/run.yaml"],
        ["inspect", "~nosuchuser/a.zip"],
        ["inspect", "~/a.zip", "--html=~nosuchuser/x.html"],
        ["plan", "model=~nosuchuser/base"],
        ["plan", "--results=~nosuchuser/results", "--gpu=H100"],
        ["submit", "~nosuchuser/run.yaml", "--backend=local", "--dry-run"],
        ["shard", "~nosuchuser/run.yaml"],
    ],
    ids=" ".join,
)
def test_an_unknown_user_is_one_line_of_every_command(words, home, capfd, adapter):
    (home / "a.safetensors").write_bytes(adapter)
    Path("a.safetensors").write_bytes(adapter)
    assert cli.main(words) == 2
    said = capfd.readouterr().err
    assert "no user nosuchuser on this machine" in said
    assert said.count("\n") == 1


@pytest.fixture
def adapter():
    key = "model.to_cond_embed.0.parametrizations.weight.0"
    return save({f"{key}.lora_A": torch.ones(2, 4), f"{key}.lora_B": torch.ones(3, 2)})


def test_commands_expand_the_home_of_their_paths(home, adapter, capfd):
    (home / "a.safetensors").write_bytes(adapter)
    assert cli.main(["merge", "~/a.safetensors=0.5", "--output=~/b.safetensors"]) == 0, capfd.readouterr().err
    assert (home / "b.safetensors").is_file()
    (home / "run.yaml").write_text("audio_data_url: ~/clips.zip\n")
    assert cli.main(["train", "~/run.yaml", "--print-config"]) == 0
    assert f"audio_data_url: {home}/clips.zip" in capfd.readouterr().out


def test_the_supervisor_looks_for_the_status_where_the_run_leaves_it(home):
    def status(*words):
        return supervise.status_path(["torchrun", "-m", "sa3dist.train", "audio_data_url=x", *words])

    assert status("output_dir=~/x") == home / "x/status.json"
    assert status("name=1.10") == Path("runs/1.10/status.json")
    # Refused for it, and told where a run without output_dir would.
    assert status("output_dir=~nosuchuser/x") == Path("runs/sa3dist-lora/status.json")
    assert status(f"output_dir={'x' * 300}", "name=n") == Path("runs/n/status.json")


def test_a_pod_has_another_home(home, capfd):
    words = ["submit", "--backend=kubernetes", "--dry-run", "audio_data_url=x", "output_dir=~/x", "work_dir=/data/w"]
    assert cli.main(words) == 2
    assert capfd.readouterr().err.startswith("output_dir: ~/x is a home of this machine; give its path in the pod")


@pytest.mark.parametrize("field", [field for field in PLACES if field not in ("output_dir", "work_dir")])
def test_a_long_value_is_a_users_mistake(field, demo_base, demo_clips, tmp_path, capfd):
    values = {
        "audio_data_url": demo_clips,
        "model": demo_base,
        "output_dir": tmp_path / "out",
        "work_dir": tmp_path / "w",
    }
    values |= {
        "base_precision": "fp32",
        "mixed_precision": "no",
        "number_of_steps": 1,
        "num_workers": 0,
        field: "x" * 5000,
    }
    assert train.main([f"{key}={value}" for key, value in values.items()]) == 2
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "word", ["name=\udcff", "audio_data_url=/caf\udce9", "output_dir=\udce9", "caf\udce9.yaml", "\udcff=1"]
)
def test_words_that_are_not_utf_8_are_one_line_and_leave_nothing_of_that_name(word, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert train.main(["audio_data_url=x", word]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert json.loads(Path("runs/sa3dist-lora/status.json").read_text())["message"] == said.strip()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_every_text_that_may_be_a_path_is_known_as_one():
    texts = {field for field in Settings.model_fields if "path" in config.allowed_values(field)}
    assert texts <= set(PLACES)
