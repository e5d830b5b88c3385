"""``s3t plan`` and ``s3t simulate``: the numbers that they print, and what they refuse."""

from __future__ import annotations

import json

import pytest

from s3t_ext.cli.main import main
from s3t_ext.plan import last_death, rotation
from s3t_ext.plan.theory import death


def ask(capsys, *words: object) -> dict:
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def said(capsys, *words: object) -> str:
    assert main([*map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys, *words: object) -> str:
    assert main([*map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.removeprefix("s3t: error: ").strip()


def test_a_plan_in_numbers(capsys) -> None:
    report = ask(capsys, "plan")
    assert (report["strategy"], report["stages"], report["slice_passes"], report["sequences"]) == ("subsets", 15, 32, 6)
    assert report["layer_passes"] == sum(i * i * n for i, n in ((1, 4), (2, 6), (3, 4), (4, 1))) / 4
    assert report["expected_depth"]["2"] == 2.25
    assert report["deletion_rate"] == pytest.approx(
        {name: death(rotation(4, 4), 5, j).mean for name, j in (("first", 1), ("half", 3), ("last", 5))}
    )
    assert report["beside"]["rotation"]["slice_passes"] == 30  # three sequences; four take 40
    assert report["beside"]["greedy"]["slice_passes"] <= 32
    assert report["tree"]["slices"] == 4
    assert len(report["tree"]["sequences"]) == 6


def test_the_default_above_six_slices_is_rotation(capsys) -> None:
    report = ask(capsys, "plan", "--slices", 7)
    assert (report["strategy"], report["sequences"]) == ("rotation", 7)


def test_the_table_is_sorted_by_cost_and_holds_every_strategy(capsys) -> None:
    lines = said(capsys, "plan", "--slices", 5, "--strategy", "rotation", "--budget", 3).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("strategy"))
    rows = [line.split() for line in lines[head + 1 :]]
    assert {row[0] for row in rows} == {"sisa", "rotation", "bms", "conditional", "random", "subsets", "greedy"}
    passes = [int(row[2]) for row in rows]
    assert passes == sorted(passes)
    assert passes[0] == 15  # sisa: 1 + 2 + ... + 5


def test_an_equal_budget_is_of_sequences_or_of_passes(capsys) -> None:
    report = ask(capsys, "plan", "--slices", 6, "--strategy", "rotation", "--budget", 3)["beside"]
    assert {report[name]["sequences"] for name in ("bms", "conditional", "random")} == {3}
    assert report["greedy"]["slice_passes"] <= 63
    report = ask(capsys, "plan", "--slices", 6, "--strategy", "greedy", "--budget", 130)
    for name in ("rotation", "bms", "conditional", "random"):
        assert report["beside"][name]["slice_passes"] <= report["slice_passes"] <= 130
        assert report["beside"][name]["sequences"] == 6


def test_a_prior_changes_what_a_plan_is_worth(capsys, tmp_path) -> None:
    words = ("plan", "--slices", 3, "--strategy", "rotation", "--budget", 1)
    safe = ask(capsys, *words, "--prior", "0.1,0.2,0.7")
    risky = ask(capsys, *words, "--prior", "0.7,0.2,0.1")
    assert safe["prior"] == pytest.approx([0.1, 0.2, 0.7])
    assert safe["deletion_rate"]["first"] == pytest.approx(10)
    assert risky["deletion_rate"]["first"] == pytest.approx(1 / 0.7)
    assert safe["expected_depth"]["1"] == pytest.approx(0 * 0.1 + 1 * 0.2 + 2 * 0.7)
    history = tmp_path / "history"
    history.write_text("0 2\n4 2\n1 1\n")
    assert ask(capsys, *words, "--history", history)["prior"] == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def test_what_never_happens_is_no_number(capsys) -> None:
    words = ("plan", "--slices", 2, "--strategy", "rotation", "--prior", "0,1")
    assert ask(capsys, *words)["deletion_rate"] == {"first": None, "half": None, "last": None}
    assert "never" in said(capsys, *words)


def test_the_floor_is_the_first_request_below(capsys) -> None:
    report = ask(capsys, "plan", "--shards", 1, "--slices", 4, "--floor", 2)
    assert report["depth_floor"] == 3  # expected depth 2.25 after two hits, 1.6875 after three
    half = ask(capsys, "plan", "--slices", 2, "--strategy", "rotation", "--prior", "0,1", "--floor", 0.9)
    assert half["depth_floor"] is None  # the slice that nobody asks for stays


def test_what_is_sampled_says_so(capsys) -> None:
    report = ask(capsys, "plan", "--slices", 13, "--repeats", 500)
    exact, found, error = 13 - 1, report["expected_depth"]["1"], report["expected_depth_se"]["1"]
    assert abs(found - exact) <= 4 * error or found == exact  # rotation keeps all but the slice that is hit
    sisa = report["beside"]["sisa"]
    assert 0 < sisa["expected_depth_se"]["1"] < 0.5
    assert abs(sisa["expected_depth"]["1"] - 6) <= 4 * sisa["expected_depth_se"]["1"]
    assert report["left_out"] == ["greedy"]
    said_ = said(capsys, "plan", "--slices", 13, "--repeats", 500)
    assert "sampled, 500 draws" in said_
    assert "left out, too large or not to be had at this size: greedy" in said_


def test_bytes_of_adapters(capsys) -> None:
    words = ("--rank", 16, "--layers", 4, "--widths", "4096x4096")
    memory = ask(capsys, "plan", *words)["memory"]
    assert memory["stored"] / memory["base"] == pytest.approx(0.59, rel=0.01)
    assert memory["served"] == 5 * 4 * 4 * 16 * 8192 * 4
    assert "stored MB" in said(capsys, "plan", *words)


def test_a_budget_alone_means_rotation(capsys) -> None:
    assert ask(capsys, "plan", "--budget", 3)["strategy"] == "rotation"


def test_a_tree_of_ones_own(capsys, tmp_path) -> None:
    file = tmp_path / "tree.json"
    file.write_text(json.dumps({"slices": 3, "sequences": [[0], [1, 2]]}))
    report = ask(capsys, "plan", "--slices", 3, "--strategy", file)
    assert (report["stages"], report["slice_passes"]) == (3, 4)
    assert report["tree"]["sequences"] == [[0], [1, 2]]
    assert "--slices" in refused(capsys, "plan", "--slices", 4, "--strategy", file)


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_figures(capsys, tmp_path, command) -> None:
    file = tmp_path / "figure.png"
    words = (command, "--slices", 3, "--repeats", 50, "--figure", file)
    assert ask(capsys, *words)["figure"] == str(file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "--figure" in refused(capsys, *words[:-1], tmp_path / "figure.nothing")


# --- simulate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 4, 6])
def test_simulation_and_closed_form_agree(capsys, budget) -> None:
    words = ("--shards", 5, "--slices", 6, "--budget", budget, "--strategy", "rotation", "--repeats", 2000)
    report = ask(capsys, "simulate", *words)
    assert report["last"]["exact"] == pytest.approx(last_death(5, 6, budget))
    for rule in ("first", "half", "last"):
        row = report[rule]
        assert abs(row["mean"] - row["exact"]) <= 4 * row["se"]
        assert row["reached"] == 2000
    assert report["first"]["mean"] < report["half"]["mean"] < report["last"]["mean"]


def test_a_simulation_is_a_function_of_its_seed(capsys) -> None:
    one, same, other = (ask(capsys, "simulate", "--repeats", 200, "--seed", seed) for seed in (1, 1, 2))
    assert one == same
    assert one["last"]["mean"] != other["last"]["mean"]


def test_streams(capsys, tmp_path) -> None:
    plan = ("simulate", "--shards", 2, "--slices", 2, "--strategy", "rotation")
    words = (*plan, "--repeats", 4000)
    finite = ask(capsys, *words, "--subjects", 3)["last"]
    assert abs(finite["mean"] - finite["exact"]) <= 4 * finite["se"]
    burst = ask(capsys, *words, "--burst", 5)
    assert burst["last"]["exact"] is None
    assert burst["last"]["mean"] > ask(capsys, *words)["last"]["mean"]  # a burst repeats itself
    file = tmp_path / "requests"
    file.write_text("0 0\n1 0\n0 1\n0 0\n")
    replay = ask(capsys, *plan, "--replay", file)
    assert (replay["first"]["mean"], replay["first"]["se"], replay["repeats"]) == (3, None, 1)
    assert (replay["last"]["mean"], replay["last"]["reached"]) == (None, 0)
    assert "-" in said(capsys, *plan, "--replay", file)


def test_healing_keeps_a_system_going(capsys) -> None:
    words = ("simulate", "--shards", 2, "--slices", 3, "--repeats", 20, "--heal")
    slow, fast = (ask(capsys, *words, rate)["healing"] for rate in (0.1, 20))
    assert slow["depth"]["mean"] < 1 < 2 < fast["depth"]["mean"] <= 3
    assert slow["available"]["mean"] < fast["available"]["mean"] <= 1
    assert "mean depth" in said(capsys, *words, 1)
    assert "rate" in refused(capsys, *words, -1)


def test_a_floor_is_reached_before_the_end(capsys) -> None:
    report = ask(capsys, "simulate", "--floor", 2, "--repeats", 300)
    assert 0 < report["floor"]["mean"] < report["last"]["mean"]
    assert report["floor"]["exact"] is None


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("plan", "--shards", 0), "--shards: expected at least 1, got 0"),
        (("plan", "--slices", 0), "slices: wanted an integer of at least 1, got 0"),
        (("plan", "--strategy", "rotation", "--budget", 0), "budget: wanted 1..4! = 24 sequences, got 0"),
        (("plan", "--strategy", "rotation", "--budget", 25), "budget: wanted 1..4! = 24 sequences, got 25"),
        (("plan", "--strategy", "nothing"), "strategy: wanted one of"),
        (("plan", "--strategy", "subsets", "--slices", 17), "131071 stages"),
        (("plan", "--prior", "0.5,0.5"), "--prior: wanted 4 probabilities, one for each slice, got 2"),
        (("plan", "--prior", "0.5,0.5,0.5,-0.5"), "--prior: wanted finite probabilities of at least 0, got -0.5"),
        (("plan", "--prior", "0.5,0.5,0.5,0.5"), "--prior: wanted probabilities that sum to 1, got a sum of 2"),
        (("plan", "--prior", "half"), "--prior: "),
        (("plan", "--prior", "1", "--history", "x"), "--prior, --history: expected one of them"),
        (("plan", "--history", "/nothing"), "/nothing: No such file or directory"),
        (("plan", "--floor", 5), "--floor: expected a depth above 0 and up to 4, got 5.0"),
        (("plan", "--floor", 0), "--floor: expected a depth above 0 and up to 4, got 0.0"),
        (("plan", "--layers", "2", "--widths", "10xy"), "--widths: expected inputs x outputs"),
        (("plan", "--layers", "10"), "--widths: expected inputs x outputs"),
        (("plan", "--widths", "10x10"), "--layers: expected the number of adapted layers"),
        (("simulate", "--repeats", 0), "--repeats: expected at least 1, got 0"),
        (("simulate", "--burst", 0), "size: wanted an integer of at least 1, got 0"),
        (("simulate", "--burst", 2, "--subjects", 3), "--burst, --subjects: expected one of them, got both"),
        (("simulate", "--subjects", 3, "--prior", "0.4,0.3,0.2,0.1"), "--subjects: expected no prior beside it"),
        (("simulate", "--floor", 9), "floor"),
    ],
)
def test_bad_words_are_refused(capsys, words, wanted) -> None:
    assert wanted in refused(capsys, *words)


def test_an_empty_request_file_is_refused(capsys, tmp_path) -> None:
    file = tmp_path / "requests"
    file.write_text("# none\n")
    assert "wanted at least one request" in refused(capsys, "simulate", "--replay", file)
    assert "wanted at least one request" in refused(capsys, "plan", "--history", file)
