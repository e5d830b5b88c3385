"""``s3t heal``, growth and floors from the command line."""

from __future__ import annotations

import json
import subprocess
import sys

from s3t_ext.cli.main import main


def json_of(capsys, *words) -> tuple[int, dict]:
    status = main([*map(str, words), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_depth_below_the_declared_floor_is_status_3_until_it_is_healed(files, fit_words, capsys) -> None:
    store = files / "store"
    assert main([*fit_words, "--floor", "2.5", "--shard-floor", "2", "--json"]) == 0
    people = [json.loads(line)["subject"] for line in (files / "table.jsonl").open()]
    capsys.readouterr()
    assert json_of(capsys, "status", store)[0] == 0
    assert json_of(capsys, "status", store, "--floor", "3.5")[1]["below"] == ["the mean depth 3.00 is below 3.5"]
    assert json_of(capsys, "delete", store, *people[:6])[0] == 0
    status, told = json_of(capsys, "status", store)
    assert (status, len(told["below"])) == (3, 2)
    assert told["next_deadline"] is None, "all is erased"
    assert told["healing"]["depths_after"] == [3, 3]
    foretold = json_of(capsys, "heal", store, "--dry-run")[1]
    assert {name: foretold[name] for name in told["healing"]} == told["healing"]
    assert json_of(capsys, "status", store)[0] == 3
    assert main(["status", str(store)]) == 3
    out = capsys.readouterr().out
    assert f"`s3t heal` would train {foretold['nodes']} nodes in {foretold['slice_passes']} slice-passes" in out
    assert "below the floor: the mean depth" in out
    status, report = json_of(capsys, "heal", store, "--budget", "3")
    assert (status, report["slice_passes"] <= 3, report["left"]["nodes"] > 0) == (0, True, True)
    assert main(["heal", str(store)]) == 0
    assert "nodes trained in" in capsys.readouterr().out
    status, told = json_of(capsys, "status", store)
    assert (status, told["depths"], told["dirty"], told["healing"]["nodes"]) == (0, [3, 3], [], 0)
    assert json_of(capsys, "verify", store, files / "table.jsonl", "--nodes", "6")[1]["mismatched"] == 0
    main(["backup", str(store), str(files / "copy")])
    assert main([*fit_words, "--floor", "3.5", "--json"]) == 0, "no identity holds the floor: it may change"
    capsys.readouterr()
    assert json_of(capsys, "status", store)[1]["below"] == ["the mean depth 3.00 is below 3.5"]
    assert main([*fit_words, "--json"]) == 0
    capsys.readouterr()
    assert json_of(capsys, "status", store)[0] == 3, "where none is said the last one holds"
    assert main(["restore", str(files / "copy"), str(store), "--json"]) == 0
    capsys.readouterr()
    assert json_of(capsys, "status", store)[1]["floor"] == {"mean": 3.5, "shard": 0}
    assert main(["heal", str(store), "--budget", "-1"]) == 2


def test_new_records_come_by_an_explicit_word(files, fit_words, capsys) -> None:
    store, new = files / "store", files / "new.jsonl"
    assert main([*fit_words, "--json"]) == 0
    rows = [json.loads(line) for line in (files / "table.jsonl").open()]
    person = rows[0]["subject"]
    main(["delete", str(store), person])
    names = [f"new {i % 12}" for i in range(len(rows) - 3)] + 3 * [person]
    new.write_text("\n".join(json.dumps({**row, "subject": name}) for row, name in zip(rows, names)))
    words = [*fit_words[:2], str(new), *fit_words[3:]]
    assert main(words) == 2
    assert "--grow does that" in capsys.readouterr().err
    assert main([*words, "--grow", "--grow-shards", "1", "--readmit", person]) == 0
    assert "in 2 generations of shards" in capsys.readouterr().out
    assert json_of(capsys, "status", store)[1]["generations"][1]["depths"] == [3]
    assert main(["verify", str(store), str(files / "table.jsonl"), str(new), "--nodes", "9"]) == 0
    capsys.readouterr()
    assert main(["delete", str(store), person]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "deleted" in line]
    assert sorted(told.split(" (")[0] for told in line.split(maxsplit=1)[1].split("; ")) == [
        "already deleted",
        "deleted",
    ]


def test_a_readmission_that_a_table_has_no_more_use_for_is_said(files, fit_words, capsys) -> None:
    store, new = files / "store", files / "new.jsonl"
    assert main([*fit_words, "--json"]) == 0
    rows = [json.loads(line) for line in (files / "table.jsonl").open()]
    person = rows[0]["subject"]
    main(["delete", str(store), person])
    names = [f"new {i % 12}" for i in range(len(rows) - 3)] + 3 * [person]
    new.write_text("\n".join(json.dumps({**row, "subject": name}) for row, name in zip(rows, names)))
    words = [*fit_words[:2], str(new), *fit_words[3:], "--grow"]
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--readmit", person]) == 2
    said = capsys.readouterr().err
    assert f"readmit: expected people of new records, got '{person}': this table opened its shards (from 2 on)" in said
    assert "give their records alone, as a table of its own" in said
    assert main([*words, "--readmit", "new 3"]) == 0, "who is in it is in it"


def test_neither_plans_of_healing_nor_the_status_load_torch(files, fit_words) -> None:
    main([*fit_words, "--json"])
    code = """
import sys
from s3t_ext.cli.main import main
assert main(["status", sys.argv[1]]) == main(["heal", sys.argv[1], "--dry-run"]) == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code, str(files / "store")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
