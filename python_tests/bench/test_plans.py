"""The studies of plans: their rows, and that a simulation that leaves the exact value is seen."""

from __future__ import annotations

import csv

import pytest

from bench import plans


def test_rows_tables_and_the_figure(tmp_path, capsys) -> None:
    words = ["--study", "deletion_rate", "strategies", "gain", "--repeats", "200", "--out", str(tmp_path)]
    assert plans.main(words) == 0
    said = capsys.readouterr().out
    assert "0 simulated means are more than 4 standard errors" in said
    assert (tmp_path / "plans_deletion_rate.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "plans.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert tuple(rows[0]) == plans.COLUMNS
    found = {(r["study"], r["shards"], r["slices"], r["strategy"], r["budget"], r["metric"]): r for r in rows}
    assert float(found["deletion_rate", "5", "6", "rotation", "6", "last"]["exact"]) == pytest.approx(119.85, abs=0.01)
    best = {}
    for row in rows:  # greedy is never below another strategy at its slice-passes
        if row["study"] == "strategies" and row["metric"] in ("slice_passes", "objective"):
            best.setdefault((row["slices"], row["strategy"], row["budget"]), {})[row["metric"]] = float(row["exact"])
    others = [(slices, value) for (slices, name, _), value in best.items() if name != "greedy"]
    assert len(others) > 20
    for slices, value in others:
        assert best[slices, "greedy", f"{value['slice_passes']:.0f}"]["objective"] >= value["objective"] - 1e-12
    assert all(row["commit"] for row in rows)


def test_rows_are_appended_and_a_wrong_simulation_is_seen(tmp_path, monkeypatch, capsys) -> None:
    def lying(repeats):
        at = plans._at(5, 4, "rotation", 4, repeats)
        yield {**at, "metric": "last", "mean": 70.0, "se": 0.1, "exact": 71.95}
        yield {**at, "metric": "first", "mean": 19.3, "se": 0.1, "exact": 19.29}

    monkeypatch.setitem(plans.STUDIES, "gain", lying)
    for count in (1, 2):
        assert plans.main(["--study", "gain", "--out", str(tmp_path)]) == 1
        assert "1 simulated means are more than 4" in capsys.readouterr().out
        assert len((tmp_path / "plans.csv").read_text().splitlines()) == 1 + 2 * count
