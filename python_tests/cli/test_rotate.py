"""``s3t rotate``, and what the commands say without a store key."""

from __future__ import annotations

import pytest

from .test_cli import ask, call, refused


@pytest.fixture
def store(files, fit_words, capsys):
    ask(capsys, *fit_words)
    return files / "store"


def test_a_new_key_by_file_and_by_environment(files, store, capsys, monkeypatch) -> None:
    key, new = files / "store.key", files / "new"
    before = key.read_text()
    report = ask(capsys, "rotate", store)
    assert report["damaged"] == []
    assert key.read_text() != before
    assert "destroy every copy" in call(capsys, "rotate", store)[1]
    monkeypatch.setenv("S3T_STORE_KEY", key.read_text())
    key.unlink()
    refused(capsys, "rotate", store, says="S3T_STORE_KEY")
    assert "set S3T_STORE_KEY to the digits in" in call(capsys, "rotate", store, "--new-key", new)[1]
    refused(capsys, "delete", store, "person 3", says="S3T_STORE_KEY is the store key")
    monkeypatch.setenv("S3T_STORE_KEY", new.read_text())
    assert ask(capsys, "delete", store, "person 3")["subjects"][0]["status"] == "deleted"
    data = (store / "records" / "0-0.sealed").read_bytes()
    (store / "records" / "0-0.sealed").write_bytes(bytes(len(data)))
    status, out, _ = call(capsys, "rotate", store, "--new-key", files / "newer")
    assert (status, "damaged, left as they are: records/0-0" in out) == (1, True)


def test_without_its_key_a_store_answers_nobody_and_loses_nothing(files, store, capsys) -> None:
    (files / "store.key").rename(files / "away")
    status, said, _ = call(capsys, "status", store)
    assert (status, "nothing can be served, deleted or trained: " in said) == (2, True)
    for words in (["delete", store, "person 3"], ["predict", store, files / "table.jsonl"], ["rotate", store]):
        refused(capsys, *words, says="the store key")
        assert "or remove" not in call(capsys, *words)[2], "no advice about nodes"
    refused(capsys, "verify", store, files / "table.jsonl", says="is missing")
    assert call(capsys, "status", store)[:2] == (status, said)
    (files / "away").rename(files / "store.key")
    assert ask(capsys, "delete", store, "person 3")["subjects"][0]["status"] == "deleted"
