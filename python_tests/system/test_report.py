"""The page about a store: what it says, that it is registered first, and where it may not lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import Tiny

from s3t_ext.cli.main import main
from s3t_ext.store.files import StoreError
from s3t_ext.system import report as module
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.report import report
from s3t_ext.system.serve import Service
from s3t_ext.system.unlearn import delete


def test_the_page_tells_depths_nodes_requests_and_answers(mlp: Tiny, store: Path, tmp_path: Path, capsys) -> None:
    mlp.table.save(tmp_path / "evaluation.npz", mlp.schema)
    delete(store, ["person 1"])
    command = ["report", str(store), str(tmp_path / "page"), "--evaluation", str(tmp_path / "evaluation.npz"), "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    with Service(store) as service:
        assert told["quality"][-1]["accuracy"] == service.accuracy(mlp.table.inputs, mlp.table.labels)
        assert told["quality"][-1]["depths"] == list(service.depths) == told["depths"]
    assert [row["depth"] for row in told["quality"]] == [1, 2, 3]
    assert [row["planned"] for row in told["nodes_by_depth"]] == [6, 6, 2]  # two shards of subsets of three slices
    assert sum(row["trained"] for row in told["nodes_by_depth"]) == told["nodes"]["trained"] < 14
    page = (tmp_path / "page" / "report.md").read_text()
    assert f"| 3 | {told['quality'][-1]['accuracy']:.4f} |" in page
    (shard, (before, after)), *_ = told["history"][0]["shards"].items()
    assert f"{shard}: {before} to {after}" in page
    assert after < before
    for figure in ("depths.png", "answers.png"):
        assert (tmp_path / "page" / figure).read_bytes()[:4] == b"\x89PNG"
        assert f"({figure})" in page


def test_receipts_of_later_requests_name_the_page(store: Path, tmp_path: Path) -> None:
    report(store, tmp_path / "page")
    receipt = delete(store, ["person 2"])
    assert [(e["export"], e["kind"]) for e in receipt["exports"]] == [("page", "report")]


def test_a_request_meanwhile_is_told_and_nothing_is_written(store: Path, tmp_path: Path, monkeypatch) -> None:
    status, receipts = module.status, []

    def overtaken(path):
        receipts.append(delete(store, ["person 2"]))
        return status(path)

    monkeypatch.setattr(module, "status", overtaken)
    with pytest.raises(StoreError, match="a request or a healing came in meanwhile: nothing was written"):
        report(store, tmp_path / "page")
    assert not (tmp_path / "page").exists()
    assert [e["export"] for e in receipts[0]["exports"]] == ["page"]


def test_it_is_registered_before_it_is_written(store: Path, tmp_path: Path, monkeypatch) -> None:
    def fails(*_):
        with StoreFolder(store) as folder:
            assert [export.kind for export in folder.ledger.exports()] == ["report"]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_draw", fails)
    with pytest.raises(StoreError, match=r"cannot write .*page: No space left"):
        report(store, tmp_path / "page")
    assert not [path for path in tmp_path.iterdir() if "page" in path.name]


@pytest.mark.parametrize("place", ["store/page", "store"])
def test_it_does_not_lie_in_the_store_nor_over_something(store: Path, tmp_path: Path, place: str) -> None:
    with pytest.raises(ValueError, match="FOLDER: expected a new folder outside the store"):
        report(store, tmp_path / place)
