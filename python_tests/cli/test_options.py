"""Options: what a store knows need not be said again, what does not apply is refused, and soon; and what is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from s3t_ext.cli.main import main
from s3t_ext.system.wording import counted


@pytest.fixture
def store(files, fit_words, capsys):
    assert main([*fit_words, "--json"]) == 0
    capsys.readouterr()
    return files / "store"


def refused(capsys, *words, says: str) -> None:
    assert main([*map(str, words)]) == 2, words
    err = capsys.readouterr().err
    assert (err.count("\n"), says in err) == (1, True), err


def test_a_store_keeps_what_it_was_made_with(files, fit_words, store, capsys) -> None:
    """Nothing of it need be said again, to go on or to grow; what is said must be the same."""
    rows = [json.loads(line) for line in (files / "table.jsonl").open()]
    (files / "new.jsonl").write_text(
        "\n".join(json.dumps({**row, "subject": f"new {i}"}) for i, row in enumerate(rows))
    )
    assert main(["fit", str(store), str(files / "table.jsonl")]) == 0
    assert "14 nodes" in capsys.readouterr().out
    grow = ["fit", store, files / "new.jsonl", "--grow"]
    for words, says in (
        (["--rank", 4], "configuration.rank: 2, got 4"),
        (["--deadline-days", 5], "deadline_days: 30, got 5"),
        (["--model", "vit"], "was made with, 'mlp', got 'vit'"),
        (["--patch", 4], "--patch: expected at least 1, beside --model vit alone, got 4 and 'mlp'"),
        (["--dropout", 0.5, "--steps", 4], "configuration.dropout: 0.0, got 0.5; configuration.steps: 3, got 4"),
    ):
        refused(capsys, *grow, *words, says=says)
    (files / "schema.json").write_text(json.dumps({"classes": ["red", "green", "pink"], "shape": [6]}))
    refused(capsys, *grow, "--schema", files / "schema.json", says="schema.classes")
    assert main([*map(str, grow), "--rank", "2", "--model", str(files / "base"), "--deadline-days", "30"]) == 0
    assert "in 2 generations of shards" in capsys.readouterr().out
    for missing in ("schema", "model"):
        at = fit_words.index(f"--{missing}")
        words = ["fit", str(files / "other"), *fit_words[2:at], *fit_words[at + 2 :]]
        refused(capsys, *words, says=f"--{missing}: expected it for a new store")
    refused(capsys, *["fit", files / "other", *fit_words[2:]], "--grow", says="grow: expected an existing store")


def test_what_does_not_apply_is_refused(files, fit_words, store, capsys) -> None:
    table = files / "table.jsonl"
    before = (store / "epoch").read_bytes()
    for words, says in (
        (
            ["predict", store, table, "--tokens", 3],
            "--tokens: expected it of a causal store alone, got a classification",
        ),
        (["predict", store, table, "--temperature", 0.5], "--temperature: expected it of a causal store"),
        (["predict", store, table, "--seed", 1], "--seed: expected it of a causal store"),
        (["verify", store, table, "--seed", 1], "--seed: expected it beside a number of --nodes"),
        (["heal", store, "--budget", 0], "--budget: expected more than 0, got 0"),
        (["heal", store, "--minutes", 0], "--minutes: expected more than 0, got 0:"),
        (["heal", store, "--minutes", "nan"], "--minutes: expected more than 0, got nan"),
        (["heal", store, "--dry-run", "--minutes", 1], "--minutes: expected none beside --dry-run"),
        (["heal", store, "--ray-cpus", 2], "--ray-cpus: expected it beside --executor ray"),
        (
            ["delete", store, "person 1", "--dry-run", "--request-id", "r"],
            "--request-id: expected none beside --dry-run",
        ),
        ([*fit_words, "--public-epochs", 3], "--public-epochs: expected it beside a built-in --model and --public"),
        (["plan", "--rank", 4], "--rank: expected it beside --layers and --widths"),
        (["plan", "--item-size", 2], "--item-size: expected it beside --layers and --widths"),
        (["simulate", "--replay", table, "--repeats", 4], "--repeats: expected none beside --replay"),
    ):
        refused(capsys, *words, says=says)
    assert (store / "epoch").read_bytes() == before


def test_the_size_of_a_number_counts_in_a_plans_bytes(capsys) -> None:
    words = ["plan", "--layers", "4", "--widths", "8x8", "--json", "--repeats", "10"]
    sizes = []
    for more in ([], ["--item-size", "2"], ["--rank", "16"]):
        assert main([*words, *more]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["memory"]["stored"])
    assert sizes[0] == 2 * sizes[1] == sizes[2] / 2


def test_errors_come_before_torch(files, fit_words, store) -> None:
    """A wrong path is said in a fraction of the time that torch takes to load."""
    gone, table = str(files / "gone"), str(files / "table.jsonl")
    new = ["fit", str(files / "new"), *fit_words[2:]]
    calls = [
        [*new, "--model", gone],
        [*new[:2], f"{gone}.jsonl", *new[3:]],
        [*new, "--evaluation", f"{gone}.jsonl"],
        ["fit", str(files), *fit_words[2:]],
        *([name, gone, table] for name in ("predict", "verify", "audit", "report")),
        ["export", gone, "x", "--shard", "0"],
        *([name, str(store), f"{gone}.jsonl"] for name in ("predict", "verify", "audit")),
        ["report", str(store), gone, "--evaluation", f"{gone}.csv"],
    ]
    code = (
        "import json, sys; from s3t_ext.cli.main import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    assert main(words) == 2, words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(calls)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == len(calls)
    assert done.stderr.count("gone") >= len(calls) - 1


def test_the_wrong_of_two_store_keys_is_named(store, capsys, monkeypatch) -> None:
    monkeypatch.setenv("S3T_STORE_KEY", os.urandom(32).hex())
    refused(capsys, "predict", store, store.parent / "table.jsonl", says=f"{store}.key is that of {store}, but")
    (store.parent / "store.key").unlink()
    refused(capsys, "predict", store, store.parent / "table.jsonl", says="put back your copy of that one")


@pytest.mark.parametrize(
    ("number", "noun", "says"), [(1, "node", "1 node"), (2, "slice-pass", "2 slice-passes"), (0, "file", "0 files")]
)
def test_nouns_follow_their_numbers(number, noun, says) -> None:
    assert counted(number, noun) == says


def test_the_budget_says_what_it_bounds(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "of greedy its slice-passes" in out
