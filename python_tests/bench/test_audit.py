"""Audits of real images: their rows, and what is said where MNIST is not there."""

from __future__ import annotations

import csv
import gzip
import struct

import numpy as np
import pytest

from bench import audit

MODEL = {"auc": 0.5, "se": 0.05, "tpr": 0.0}
GAP = {"difference": 0.0, "difference_se": 0.01, "bound": 0.03, "within": True}
ATTACK = {"served": MODEL, "oracle": {**MODEL, **GAP}, "retrained": {**MODEL, **GAP, "within": False}}
MOVED = {"shard": 0, "slice": 1, "change": "removed", "nodes": 39, "differing": [], "moved": True, "incomparable": 0}


def report(control: float, moved: list) -> dict:
    before = {"before": {"auc": control, "se": 0.05, "tpr": 0.1}}
    groups = {"store": {"members": 80, "others": 99, "attacks": {"loss": ATTACK}}}
    groups["canaries"] = {"members": 40, "others": 40, "attacks": {"loss": {**ATTACK, **before}}}
    return {"groups": groups, "isolation": [{**MOVED, "differing": moved}]}


@pytest.mark.parametrize(("control", "moved", "status"), [(0.9, [], 0), (0.6, [], 1), (0.9, [[0, [2]]], 1)])
def test_rows_are_appended_and_what_is_wrong_is_seen(tmp_path, monkeypatch, capsys, control, moved, status) -> None:
    for name in ("fit", "delete", "pretrain"):
        monkeypatch.setattr(audit, name, lambda *_, **__: None)
    monkeypatch.setattr(audit, "audit", lambda *_, **__: report(control, moved))
    assert audit.main(["--seeds", "0", "--out", str(tmp_path)]) == status
    said = capsys.readouterr().out
    assert "mnist: skipped, no --data" in said
    assert f"{status} rows differ from the oracle or have no power" in said
    with (tmp_path / "audit.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert tuple(rows[0]) == audit.COLUMNS
    assert [(row["data"], row["group"]) for row in rows] == [("digits", n) for n in ("store", "canaries", "isolation")]
    assert [row["before"] for row in rows] == ["", str(control), ""]
    assert [row["retrained_within"] for row in rows] == ["False", "False", ""], "told, not judged"
    assert [row["moved"] for row in rows] == ["", "", str(len(moved))]
    assert all(row["commit"] and row["seed"] == "0" for row in rows)


def test_a_subset_of_idx_files(tmp_path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    for name in ("train", "t10k"):
        labels, images = rng.integers(0, 10, 200, np.uint8), rng.integers(0, 256, (200, 28, 28), np.uint8)
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, data.ndim]) + struct.pack(f">{data.ndim}i", *data.shape)
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + data.tobytes()))
    monkeypatch.setattr(audit, "MNIST", {"public": 40, "private": 30, "test": 20})
    data = audit.mnist(tmp_path, 3)
    assert [len(part) for part in (data.public, data.private, data.test)] == [40, 30, 20]
    assert data.private.inputs.shape == (30, 1, 28, 28)
    assert 0 <= data.private.inputs.min() < data.private.inputs.max() <= 1
    assert set(data.private.labels) <= set(range(5))
    same = images.reshape(200, -1).astype(np.float32) / 255  # of t10k, the last written
    for x, y in zip(data.test.inputs.reshape(20, -1), data.test.labels):
        assert labels[np.flatnonzero((same == x).all(1))[0]] == y + 5
