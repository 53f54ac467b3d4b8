"""The report shows what the results files hold: the newest measurement of every case, in a table."""

import json
from xml.etree import ElementTree

import report

ROW = {
    "device": "x86_64",
    "threads": 2,
    "shape": "small",
    "depth": 4,
    "precision": "fp32",
    "frames": 128,
    "adapter_type": "lora",
    "rank": 16,
    "ours_ms": 100.0,
    "over_frozen": 1.25,
    "ours_step_bytes": 3e8,
    "baseline_step_bytes": None,
}


def test_the_newest_measurement_of_a_case_is_shown_in_its_table(tmp_path):
    rows = [
        {**ROW, "ratio": 2.5},
        {**ROW, "ratio": 3.75, "ratio_from_audio": 7.5},
        {**ROW, "ratio": 9.5, "frames": 512},
    ]
    (tmp_path / "step_here.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    peft = {"layer": "to_q", "fan_in": 8, "fan_out": 16, "ours_ms": {"median": 2.0}, "peft_ms": {"median": 5.0}}
    options = {"dtype": "fp32", "adapter_type": "lora", "rank": 4, "tokens": 64}
    environment = {"device": "H200", "threads": 1}
    (tmp_path / "peft.json").write_text(json.dumps({"environment": environment, "options": options, "rows": [peft]}))
    block = {"milliseconds": 124.3, "over_frozen": 1.26}
    block |= {"materialised_over_factored": 3.7, "compiled_over_factored": None}
    block["layer_peak_bytes"] = {"factored": 8e6, "frozen": 7e6, "materialised": None}
    of_layers = {"environment": environment, "options": {**options, "shape": "small"}, "summary": {"dora-rows": block}}
    (tmp_path / "layers_cpu.json").write_text(json.dumps({**of_layers, "rows": []}))
    report.main(["--results", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert (
        "| x86_64, 2 threads | small x 4 | fp32 | 128 | lora r16 | - | 100 ms | 3.75x | 7.50x | 1.25 | 300 / - |"
        in text
    )
    assert "| H200 | fp32 | small, 64 tokens | dora-rows r4 | 124.3 ms | 1.26 | 3.70x | - | 8 / 7 / - |" in text
    # Of PEFT alone: the older step is gone.
    assert text.count("2.50x") == 1
    assert "9.50x" in text


def test_steps_on_a_gpu_are_shown_beside_those_before(tmp_path):
    row = {**ROW, "shape": "medium-base", "frames": 4091, "total_bytes": 15e9}
    for folder, name, step in (("before", "gpu_step_before.json", 765.0), ("", "gpu_step.json", 101.25)):
        (tmp_path / folder).mkdir(exist_ok=True)
        content = {"environment": {"device": "H100"}, "options": {"device": "cuda"}, "rows": [{**row, "ours_ms": step}]}
        del content["rows"][0]["device"]
        (tmp_path / folder / name).write_text(json.dumps(content))
    report.main(["--results", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    case = "H100 | medium-base, 4091 frames | lora r16 | -"
    before = text.index(f"| gpu_step_before.json | {case} | 765.0 ms | 1.25 | - | - | 15000 / - |")
    assert before < text.index(f"| gpu_step.json | {case} | 101.2 ms |")
    assert "`before/`" in text


def test_the_picture_has_a_bar_as_long_as_each_step_took(tmp_path):
    row = {"shape": "medium-base", "adapter_type": "dora-rows", "rank": 16, "frames": 323}
    (tmp_path / "before").mkdir()
    kept = {"before/gpu_reference_before": {"reference_ms": 600.0}, "gpu_step": {"ours_ms": 20.0, "frozen_ms": 12.0}}
    for name, values in kept.items():
        content = {"environment": {"device": "H100"}, "rows": [row | values]}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    picture = ElementTree.fromstring(report.speed_picture(tmp_path))
    _, *bars = (element.attrib for element in picture if element.tag.endswith("rect"))
    widths = [float(bar["width"]) for bar in bars]
    assert [round(600 * width / widths[0]) for width in widths] == [600, 20, 12]
    assert "30 s of audio" in "".join(picture.itertext())
    (tmp_path / "gpu_step.json").unlink()
    assert report.speed_picture(tmp_path) is None
