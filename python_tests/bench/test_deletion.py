"""The latency of deletions: what a row says, and that the effect comes before the acknowledgement."""

import csv

from bench import deletion


def test_rows(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(deletion, "SHARDS", 2)
    monkeypatch.setattr(deletion, "SLICES", 2)
    monkeypatch.setattr(deletion, "PEOPLE", 40)
    status = deletion.main(
        ["--threads", "0", "1", "--deletions", "1", "--folder", str(tmp_path), "--out", str(tmp_path)]
    )
    with (tmp_path / "deletion.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert status in (0, 1)
    found = {(row["case"], row["threads"], row["metric"]): row for row in rows}
    metrics = ["effect", "acknowledgement", "erasure"]
    assert list(found) == [
        *(("here", "0", name) for name in metrics),
        *(("another process", "0", name) for name in metrics),
        *(("here", "1", name) for name in metrics),
        *(("another process", "1", name) for name in [*metrics, "seen"]),
    ]
    for case, threads, _ in found:
        effect, acknowledged, erased = (float(found[case, threads, name]["p50"]) for name in metrics)
        assert 0 < effect < acknowledged < erased
    assert all(row["deletions"] == "3" and row["disk"] and row["unit"] == "ms" for row in rows)
    assert all(int(row["answers"]) > 0 for row in rows if row["threads"] == "1")
    assert ("goal 5:" in capsys.readouterr().out) == (len(deletion.os.sched_getaffinity(0)) == 1)
    assert [path.name for path in tmp_path.iterdir()] == ["deletion.csv"]
