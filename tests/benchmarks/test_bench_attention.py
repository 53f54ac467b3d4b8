"""The attention benchmark's cases agree with float32, whatever kernel they take here."""

import json

import bench_attention


def test_every_case_agrees_with_float32_and_is_written_down(tmp_path):
    bench_attention.main(["--tiny", "--device", "cpu", "--json", str(tmp_path / "rows.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == ["one clip", "filled", "prompt"]
    for row in rows:
        assert row["kernel"] == "training"
        assert max(row["distances"]) < 1e-2
        assert row["launched_ms"] > 0
