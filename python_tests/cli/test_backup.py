"""``s3t backup`` and ``s3t restore``."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from .test_cli import ask, call, refused


@pytest.fixture
def store(files, fit_words, capsys):
    ask(capsys, *fit_words)
    return files / "store"


def test_there_and_back(files, store, capsys) -> None:
    answers = ask(capsys, "predict", store, files / "table.jsonl")["labels"]
    status, out, _ = call(capsys, "backup", store, files / "monday")
    assert status == 0
    assert f"{files}/store.key" in out, "what is not in it is said"
    assert f"{files}/store.anchor" in out
    shutil.rmtree(store)
    (files / "store.anchor").rename(files / "away")
    refused(capsys, "restore", files / "monday", store, says="if it is lost, --without-anchor goes on")
    (files / "away").rename(files / "store.anchor")
    assert ask(capsys, "restore", files / "monday", store)["nodes"] == 14
    assert ask(capsys, "predict", store, files / "table.jsonl")["labels"] == answers
    ask(capsys, "delete", store, "person 3", "--request-id", "r1")
    assert call(capsys, "receipt", "show", store, "r1", "--out", files / "r1.json")[0] == 0
    answers = ask(capsys, "predict", store, files / "table.jsonl")
    shutil.rmtree(store)
    refused(capsys, "restore", files / "monday", store, says="1 acknowledged requests are missing")
    status, out, _ = call(capsys, "restore", files / "monday", store, "--receipts", files / "r1.json")
    assert status == 0
    assert "1 request replayed" in out
    assert "of entries 5 to 6 only requests are back, not exports, certificates, healings, new shards or slices" in out
    again = ask(capsys, "predict", store, files / "table.jsonl")
    assert {**again, "epoch": 0} == {**answers, "epoch": 0}
    assert again["epoch"] > answers["epoch"]
    report = ask(capsys, "verify", store, files / "table.jsonl", "--certify")
    assert (report["mismatched"], report["certified"]) == (0, ["r1"])


def test_an_older_copy_is_told_what_to_do(files, store, capsys) -> None:
    shutil.copytree(store, files / "copy")
    ask(capsys, "delete", store, "person 3")
    shutil.rmtree(store)
    shutil.copytree(files / "copy", store)
    for words in (["predict", store, files / "table.jsonl"], ["status", store], ["delete", store, "person 4"]):
        refused(capsys, *words, says="nothing is served: bring back the newest state by `s3t restore`")


def test_live_nodes_that_no_backup_has_are_trained_again(files, store, fit_words, capsys) -> None:
    from tiny import weights

    before = weights(store)
    ask(capsys, "backup", store, files / "monday")
    for manifest in sorted((files / "monday" / "nodes").glob("*.json"))[:3]:
        drop(files / "monday", f"nodes/{manifest.name}")
    shutil.rmtree(store)
    status, out, _ = call(capsys, "restore", files / "monday", store, "--without-anchor")
    assert status == 0
    assert "missing: 3 live nodes; `s3t fit` trains again" in out
    ask(capsys, *fit_words)
    assert weights(store) == before


def drop(backup, name) -> None:
    from s3t_ext.store.files import read_checked, write_checked

    body = read_checked(backup / "backup.json")
    del body["files"][name]
    write_checked(backup / "backup.json", body)
    (backup / name).unlink()


def test_neither_loads_torch(files, store) -> None:
    for words in (["backup", str(store), str(files / "b")], ["restore", str(files / "b"), str(store)]):
        script = (
            f"import sys; from s3t_ext.cli.main import main; assert main({words!r}) == 0\n"
            "assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
