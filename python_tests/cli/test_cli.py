"""The commands: what they print, their exit status, and one line for whatever is wrong, with the store as it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from s3t_ext.cli.main import COMMANDS, main
from s3t_ext.store.files import exclusive, read_checked, write_checked


def call(capsys, *words: object) -> tuple[int, str, str]:
    status = main([str(w) for w in words])
    out = capsys.readouterr()
    return status, out.out, out.err


def ask(capsys, *words: object) -> dict:
    status, out, _ = call(capsys, *words, "--json")
    assert status == 0, out
    return json.loads(out)


@pytest.fixture
def store(files, fit_words, capsys):
    assert ask(capsys, *fit_words)["nodes"] == 14
    return files / "store"


def contents(folder) -> str:
    """Hash what a folder holds; SQLite's shared-memory index and the lock say nothing."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name not in ("lock", "ledger.sqlite-shm", "ledger.sqlite-wal"):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def test_the_whole_way(files, store, capsys) -> None:
    assert ask(capsys, "status", store)["depths"] == [3, 3]
    answer = ask(capsys, "predict", store, files / "table.jsonl")
    assert len(answer["labels"]) == 60
    assert set(answer["labels"]) <= {"red", "green", "blue"}
    preview = ask(capsys, "delete", store, "person 3", "--dry-run")
    receipt = ask(capsys, "delete", store, "Person 3", "--request-id", "r1")
    assert receipt["subjects"][0]["status"] == "deleted"
    assert ask(capsys, "status", store)["depths"] == preview["depths_after"] != [3, 3]
    assert ask(capsys, "delete", store, "person 3", "--request-id", "r1") == receipt
    report = ask(capsys, "verify", store, files / "table.jsonl", "--nodes", "4")
    assert report["mismatched"] == 0
    assert report["nodes"] >= 4


def test_text_and_json_of_every_command(files, store, capsys) -> None:
    words = {
        "info": [],
        "plan": [],
        "simulate": ["--repeats", 20],
        "status": [store],
        "predict": [store, files / "table.jsonl"],
        "erase": [store],
        "rotate": [store],
        "delete": [store, "person 1"],
        "heal": [store],
        "verify": [store, files / "table.jsonl", "--nodes", "1"],
    }
    assert set(words) == set(COMMANDS) - {
        "audit",
        "backup",
        "demo",
        "export",
        "fit",
        "receipt",
        "report",
        "restore",
        "unlearn",
    }
    for name, rest in words.items():
        status, out, _ = call(capsys, name, *rest)
        assert status == 0
        assert out.strip()
        assert isinstance(ask(capsys, name, *rest), dict)


def test_subjects_from_a_file_and_from_standard_input(files, store, capsys, monkeypatch) -> None:
    (files / "gone.txt").write_text("person 1\n\nperson 2\n")
    assert len(ask(capsys, "delete", store, "--from", files / "gone.txt")["subjects"]) == 2
    (files / "gone.txt").write_text("\ufeffperson 1\nperson 2\n")
    with (files / "gone.txt").open() as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        receipt = ask(capsys, "delete", store, "person 3", "--from", "-")
    assert {s["status"] for s in receipt["subjects"]} == {"already deleted", "deleted"}


def test_same_table_as_csv_and_npz_gives_the_same_weights(files, fit_words, capsys) -> None:
    from tiny import weights

    ask(capsys, *fit_words)
    rows = [json.loads(line) for line in (files / "table.jsonl").read_text().splitlines()]
    (files / "wide.csv").write_text(
        "who,x1,x2,x3,x4,x5,x6,colour\n"
        + "\n".join(",".join([r["subject"], *map(repr, r["input"]), r["label"]]) for r in rows)
    )
    (files / "wide.json").write_text(
        json.dumps(
            {"classes": ["red", "green", "blue"], "shape": [6], "subject": "who", "input": "x*", "label": "colour"}
        )
    )
    np.savez(
        files / "table.npz",
        subject=[r["subject"] for r in rows],
        label=[r["label"] for r in rows],
        input=np.array([r["input"] for r in rows], np.float32),
    )
    for name, table, schema in (("a", "wide.csv", "wide.json"), ("b", "table.npz", "schema.json")):
        words = [w.replace("table.jsonl", table).replace("schema.json", schema) for w in fit_words]
        words[1] = str(files / name)
        ask(capsys, *words)
        assert weights(files / name) == weights(files / "store")


def test_builtin_model_with_public_and_evaluation_parts(files, fit_words, capsys) -> None:
    words = [w if w != str(files / "base") else "mlp" for w in fit_words]
    rows = (files / "table.jsonl").read_text().replace("person", "tester")
    (files / "test.jsonl").write_text(rows)
    (files / "public.jsonl").write_text(rows.replace("tester", "volunteer"))
    report = ask(capsys, *words, "--public", files / "public.jsonl", "--evaluation", files / "test.jsonl")
    assert 0 <= report["accuracy"] <= 1
    receipt = ask(capsys, "delete", files / "store", "tester 1", "Volunteer 2", "nobody")
    assert sorted(s["status"] for s in receipt["subjects"]) == [
        "held in a declared part, not covered",
        "held in a declared part, not covered",
        "not held",
    ]


def test_books_commands_load_no_torch(store) -> None:
    for words in (["delete", str(store), "nobody"], ["status", str(store)], ["plan"]):
        script = (
            f"import sys; from s3t_ext.cli.main import main; assert main({words!r}) == 0\n"
            "assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_subjects_may_follow_options(store, capsys) -> None:
    assert len(ask(capsys, "delete", store, "--request-id", "r1", "person 1", "person 2")["subjects"]) == 2


def test_results_that_cannot_be_printed_are_said(store) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "s3t_ext.cli.main", "status", str(store)], stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


# --- bad input: one line, status 2, nothing lost ----------------------------------------------------------------------


def refused(capsys, *words: object, says: str) -> None:
    status, out, err = call(capsys, *words)
    assert status == 2, out + err
    assert out == ""
    assert err.startswith("s3t: error: ")
    assert err.count("\n") == 1, err
    assert says in err, err
    status, out, _ = call(capsys, *words, "--json")
    assert (status, list(json.loads(out))) == (2, ["error"])


BAD_ROWS = {
    "not JSON": ("{", "row 61: expected a JSON object"),
    "missing column": ('{"subject": "a", "label": "red"}', "row 61: column 'input' is missing"),
    "NaN": (
        '{"subject": "a", "input": [1, 2, 3, 4, 5, NaN], "label": "red"}',
        "row 61, column 'input': expected finite",
    ),
    "label": ('{"subject": "a", "input": [1, 2, 3, 4, 5, 6], "label": "pink"}', "row 61, column 'label'"),
    "size": ('{"subject": "a", "input": [1, 2, 3], "label": "red"}', "row 61, column 'input': expected 6 numbers"),
    "text": ('{"subject": "a", "input": "abc", "label": "red"}', "row 61, column 'input': expected numbers"),
    "no subject": ('{"subject": " ", "input": [1, 2, 3, 4, 5, 6], "label": "red"}', "row 61, column 'subject'"),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_bad_rows(files, fit_words, capsys, bad) -> None:
    line, says = BAD_ROWS[bad]
    with (files / "table.jsonl").open("a") as out:
        out.write(line + "\n")
    before = sorted(p.name for p in files.iterdir())
    refused(capsys, *fit_words, says=says)
    assert sorted(p.name for p in files.iterdir()) == before, "no half-made store stays"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--slices", "0"], "slices"),
        (["--placement", "rows"], "placement"),
        (["--strategy", "luck"], "strategy"),
        (["--targets", "lm_head"], "targets"),
        (["--rank", "x"], "rank"),
        (["--combine", "max"], "combine"),
        (["--lr", "-1"], "lr"),
        (["--lr", "inf"], "lr"),
        (["--targets", "("], "error"),
        (["--strategy", "subsets", "--slices", "17"], "subsets"),
        (["--strategy", "subsets", "--budget", "3"], "budget"),
        (["--frob"], "--frob"),
        (["--placement", "layers", "--slices", "4"], "at least as many layers"),
        (["--schema", "/nowhere"], "/nowhere"),
        (["--model", "/nowhere"], "model"),
        (["--public", "/nowhere.csv"], "/nowhere.csv"),
        (["--nodes-per-pass", "-1"], "nodes_per_pass"),
        (["--memory", "-1"], "--memory: expected a number of GiB above 0, got -1"),
        (["--memory", "nan"], "--memory: expected a number of GiB above 0, got nan"),
        (["--memory", "1e-6"], "for one node, got 1.05 KiB; allow more, free some"),
        (
            ["--placement", "layers", "--targets", "head"],
            "targets: expected a pattern for some of the linear layers in the blocks 'layers', of which placement",
        ),
        (["--patch", "4"], "--patch: expected at least 1, beside --model vit alone, got 4"),
        (["--public-epochs", "0"], "--public-epochs: expected at least 1, got 0"),
    ],
)
def test_bad_settings(files, fit_words, capsys, words, says) -> None:
    refused(capsys, *fit_words, *words, says=says)
    assert not list(files.glob("*store*")), "nothing was written"


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"classes": ["red"], "shape": [6]}, "classes"),
        ({"shape": [6]}, "classes"),
        ("x", "JSON object"),
        ({"classes": ["a", "b"], "shape": [0]}, "shape"),
        ({"classes": ["a", "b"], "shape": [6], "colour": 1}, "colour"),
        ({"classes": ["a", "b"], "shape": [7]}, "schema.shape: expected [6], what the base model in"),
        ({"classes": None, "shape": [6]}, "classes"),
        ({"classes": ["a", "b"], "shape": 6}, "shape"),
        ({"classes": ["a", "b"], "shape": [6], "scale": 0}, "scale"),
        ({"classes": ["a", "b"], "shape": [6], "label": "subject"}, "columns"),
        ({"classes": [str(i) for i in range(40)], "shape": [6]}, "classes"),
    ],
)
def test_bad_schema(files, fit_words, capsys, schema, says) -> None:
    (files / "schema.json").write_text(json.dumps(schema))
    refused(capsys, *fit_words, says=says)


def test_no_store_and_other_folders(files, store, fit_words, capsys, tmp_path) -> None:
    refused(capsys, "status", files / "nowhere", says="holds no store")
    refused(capsys, *[fit_words[0], str(files), *fit_words[2:]], says="holds other files")
    refused(capsys, "delete", store, says="SUBJECT")
    refused(capsys, "delete", store, "  ", says="subject")
    refused(capsys, "predict", store, files / "key", says="expected a file ending in")
    refused(capsys, "predict", store, files / "nothing.jsonl", says="nothing.jsonl")
    refused(capsys, "verify", store, files / "table.jsonl", "--nodes", "some", says="nodes")
    refused(capsys, "frobnicate", says="frobnicate")


def test_resume_with_other_declarations(files, store, fit_words, capsys) -> None:
    before = contents(store)
    says = "was made with, configuration.lr: 0.01, got 0.5; configuration.steps: 3, got 4; use a new store"
    refused(capsys, *fit_words, "--steps", "4", "--lr", "0.5", says=says)
    other = files / "other.jsonl"
    other.write_text("\n".join((files / "table.jsonl").read_text().splitlines()[:-1]))
    refused(capsys, *[w.replace("table.jsonl", "other.jsonl") for w in fit_words], says="1 missing")
    (files / "key").write_text("cd" * 32)
    refused(capsys, *fit_words, says="key")
    assert contents(store) == before


def test_another_format_version(files, store, capsys) -> None:
    text = (store / "store.json").read_text()
    (store / "store.json").write_text(text.replace('"format":2', '"format":3'))
    refused(capsys, "status", store, says="format 3")


def test_a_flipped_byte_anywhere_is_seen(files, store, capsys) -> None:
    """In each file of the store, at a few places: refused with one line, or without effect on the answer."""
    want = ask(capsys, "predict", store, files / "table.jsonl")
    seen = 0
    for path in sorted(p for p in store.rglob("*") if p.is_file() and p.name not in ("lock",)):
        whole = path.read_bytes()
        for at in {0, len(whole) // 3, len(whole) // 2, len(whole) - 2}:
            if at < 0 or at >= len(whole):
                continue
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            status, out, err = call(capsys, "predict", store, files / "table.jsonl", "--json")
            assert status == 2 or json.loads(out) == want, (path.name, at)
            seen += status == 2
            if status == 2:
                assert err.count("\n") == 1, err
        path.write_bytes(whole)
    assert seen > 40, "most flips lie in files that are read, and are seen"
    assert ask(capsys, "predict", store, files / "table.jsonl") == want


def test_two_writers(files, store, fit_words, capsys) -> None:
    with exclusive(store):
        refused(capsys, *fit_words, says="is writing to")


def _with_full_disk(words: list[str], limit: int) -> subprocess.CompletedProcess:
    """Run a command whose files cannot grow past ``limit`` bytes, as on a full disk."""

    def constrain() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "s3t_ext.cli.main", *words], preexec_fn=constrain, text=True, capture_output=True
    )


def test_full_disk(files, store, fit_words, capsys) -> None:
    before = contents(store)
    for limit in (0, 4096):
        done = _with_full_disk(["delete", str(store), "person 1"], limit)
        assert done.returncode == 2, done
        assert done.stderr.count("\n") == 1
        assert ask(capsys, "status", store)["requests"] == 0
    assert contents(store) == before
    words = [fit_words[0], str(files / "new"), *fit_words[2:]]
    for limit in (100, 5000):
        done = _with_full_disk(words, limit)
        assert done.returncode == 2, done
        assert done.stderr.splitlines()[-1].startswith("s3t: error: ")
        assert not (files / "new").exists()
        assert not list(files.glob(".new*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_read_only_folder(files, store, capsys) -> None:
    store.chmod(0o500)
    try:
        refused(capsys, "delete", store, "person 1", says="writable")
    finally:
        store.chmod(0o700)


def test_a_file_in_place_of_a_folder(files, fit_words, capsys) -> None:
    (files / "file").write_text("")
    refused(capsys, fit_words[0], files / "file" / "store", *fit_words[2:], says="cannot create")


def test_all_shards_dead(files, store, capsys) -> None:
    people = sorted({json.loads(line)["subject"] for line in (files / "table.jsonl").read_text().splitlines()})
    assert ask(capsys, "delete", store, *people)["shards"]
    assert ask(capsys, "status", store)["dead_shards"] == [0, 1]
    refused(capsys, "predict", store, files / "table.jsonl", says="every shard is dead")
    refused(capsys, "verify", store, files / "table.jsonl", says="no live node")


def test_verify_exits_1_on_a_difference(files, store, capsys) -> None:
    rows = (files / "table.jsonl").read_text().splitlines()
    changed = json.loads(rows[0])
    changed["input"][0] += 1
    (files / "table.jsonl").write_text("\n".join([json.dumps(changed), *rows[1:]]))
    status, out, _ = call(capsys, "verify", store, files / "table.jsonl", "--json")
    assert status == 1
    assert json.loads(out)["mismatched"] == 4


def test_verify_says_what_to_do_where_nothing_can_be_compared(files, store, capsys) -> None:
    for manifest in (store / "nodes").glob("*.json"):
        body = read_checked(manifest)
        write_checked(manifest, {**body, "provenance": {**body["provenance"], "torch": "1.0"}})
    words = "verify", store, files / "table.jsonl"
    refused(capsys, *words, says="torch: trained with 1.0, here 2")
    refused(capsys, *words, says="; verify where these agree")


def processor_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_commands_start_quickly(store) -> None:
    """``status`` loads no torch; a loose bound on the processor's time, for a busy machine."""
    command = [sys.executable, "-m", "s3t_ext.cli.main", "status", str(store)]
    assert processor_seconds(command) < 2


def test_help_of_fit_tells_of_every_declaration(capsys) -> None:
    from s3t_ext.cli.fit import DECLARED
    from s3t_ext.system.config import Config

    assert list(DECLARED) == [field.name for field in dataclasses.fields(Config)]
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--ensemble ENSEMBLE best: the deepest node of each shard answers" in out
    assert "None" not in out
