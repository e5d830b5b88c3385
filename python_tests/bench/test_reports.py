"""What is said of rows: goals, tables and figures hold the figures that the rows give, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import goals, plot, report, rows, unlearning, unlearning_report
from bench.cases import CPU_DEFAULT, Case
from bench.rows import COLUMNS, RESULTS


def test_a_table_holds_times_over_the_plain_layer() -> None:
    case = replace(CPU_DEFAULT, G=20, P=4).name
    times = {"bare": 10.0, "auto-exact": 20.0, "auto-fast": 15.0, "naive": 41.0}
    said = report.ratios({"case": case, "provider": n, "p20": t, "p50": t, "p80": t} for n, t in times.items())
    (line,) = (line for line in said.splitlines() if line.startswith(case))
    assert line.split()[1:] == ["10.0", "1.17", "2.00", "1.50", "4.10"]
    assert "4 adapter(s) each: ours 15 us, naive 41 us, the plain layer 10 us." in said


def test_goals_without_rows(capsys, tmp_path) -> None:
    """Other tables lie beside the rows in the tree; none of them is taken for rows."""
    assert list(RESULTS.glob("*.csv"))
    assert plot.main(["--no-figures"]) == 0
    assert "goal " in capsys.readouterr().out
    for path in RESULTS.glob("occupancy*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
        with pytest.raises(SystemExit) as stop:
            plot.main([str(path), "--out", str(tmp_path)])
        assert stop.value.code == 2
        assert "expected rows of python -m bench.run" in capsys.readouterr().err
    assert plot.main(["--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "forward, T <= 64, R = 64 " in said
    assert "strongest baseline over ours, worst, 1t " in said
    assert " met" not in said
    assert f"No rows in {tmp_path}. Measure them: python -m bench.run" in said


def test_rows_are_found_where_they_were_written(capsys, tmp_path) -> None:
    values = {"case": Case(T=1, K=8, O=8).name, "provider": "bare", "metric": "time", "p50": "2.0", "commit": "c0ffee"}
    (tmp_path / "device.csv").write_text(
        ",".join(COLUMNS) + "\n" + ",".join(values.get(name, "") for name in COLUMNS) + "\n"
    )
    (tmp_path / "empty.csv").touch()
    assert plot.main(["--no-figures", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "device  commits c0ffee+ (layers)  (+: changed files)\n" in said
    assert "No rows" not in said


def test_figures_are_of_one_commit(tmp_path) -> None:
    """The last row names it, once for layers and once for whole models; a tree with changes is a commit of its own."""
    written = [  # commit, dirty, provider, metric, p50
        ("0ld", "0", "gone", "time", 1.0),
        ("0ld", "0", "bare", "time", 2.0),
        ("new", "1", "cat", "time", 3.0),
        ("new", "1", "bare", "ceiling", 4.0),
        ("new", "0", "bare", "time", 5.0),
        ("new", "0", "copy", "ceiling", 6.0),
        ("0ld", "0", "peft", "tokens", 7.0),
        ("0lder", "0", "bare", "time", 8.0),
        ("mid", "0", "bare", "tokens", 9.0),
        ("new", "0", "naive", "time", 10.0),
    ]
    case = CPU_DEFAULT.name
    names = ("commit", "dirty", "provider", "metric", "p50")
    rows.append(tmp_path / "device.csv", ({"case": case, "timer": "1t", **dict(zip(names, w))} for w in written))
    m = rows.read(tmp_path / "device.csv")
    assert m.times == {(case, "bare"): 5.0, (case, "naive"): 10.0}
    assert m.ceilings == {("1t", "copy"): 6.0}
    assert m.tokens == {(case, "bare"): 9.0}
    assert m.commits == {"layers": "new", "models": "mid"}
    said = goals.summary(m).splitlines()[0]
    assert said == "device  commits new (layers), mid (models)  (+: changed files); 6 rows of other commits left out"


def test_a_busy_machine_is_told() -> None:
    calm = {"case": CPU_DEFAULT.name, "provider": "bare", "p20": "1.0", "p50": "1.1", "p80": "1.2"}
    assert "NOISY" not in report.ratios([calm] * 10)
    assert "NOISY: in 3 of 10 rows" in report.ratios([calm] * 7 + [calm | {"p80": "1.6"}] * 3)


def test_of_two_runs_the_newer_stands_and_the_score_holds_until_the_next(tmp_path) -> None:
    path, at = tmp_path / "rows.csv", {"data": "d", "method": "sisa-stack", "seed": 0, "unit": "accuracy"}
    stream = (("score after", 0, 0.9), ("score after", 15, 0.5), ("served", "last", 30))
    new = [{**at, "metric": m, "x": x, "value": v, "settings": "new", "utc": "2"} for m, x, v in stream]
    old = {**at, "metric": "score after", "x": 3, "value": 0.1, "settings": "old", "utc": "1"}
    unlearning.append(path, [old, *new], unlearning.COLUMNS)
    text = unlearning_report.table(path)
    assert "| SISA, `stack` | 0.900 | 0.500 |" in text, "after 10, after 20; none after 40"
    assert "after 40" not in text
    assert "0.100" not in text
    assert "**d**: accuracy, higher is better; mean of the seeds 0 that serve" in text
    assert text.rstrip().endswith("|")


def test_the_report_says_means_spread_and_what_was_measured(tmp_path) -> None:
    path, told_of = tmp_path / "rows.csv", []
    for seed, value in ((0, 10.0), (1, 14.0)):
        at = {"data": "d", "method": "subsets-stack", "seed": seed, "unit": "rmse", "settings": "s", "utc": str(seed)}
        told = [("score at depth", 1, value), ("score at depth", 2, value - 5), ("acknowledged", "p50", 3 + seed)]
        told += [
            (f"score {when}", part, value + 1) for when in ("before", "after") for part in ("deleted", "kept", "test")
        ]
        told += [("similarity", "stages 1 and 2 of a sequence", 0.25), ("healed", 1, 2.0), ("training", "", 4.0)]
        told_of += [{**at, "metric": m, "x": x, "value": v, "load": 2 + seed} for m, x, v in told]
    told_of.append({**at, "method": "base", "metric": "score at depth", "x": 0, "value": 99.0})
    unlearning.append(path, told_of, unlearning.COLUMNS)
    text = unlearning_report.table(path)
    assert (
        "**d**: rmse, lower is better; mean of the seeds 0, 1 that serve, whose standard deviation is at most 2.828"
        in text
    )
    assert "| S3T `subsets`, `stack` | 7.000 | 12.000 |" in text, "whole, at depth 1"
    assert "| S3T `subsets`, `stack` | 4 / 2.0 / - |" in text
    assert "| base alone (of 1 seeds) | 99.000 |" in text
    assert "acknowledged in 3.5 ms (median over stores)" in text
    assert "Load of the machine: 2.0 to 3.0" in text
    assert "| d | 13.000 / 13.000 / 13.000 | 13.000 / 13.000 / 13.000 |" in text
    assert "| two stages of one sequence | 0.25 / - |" in text
