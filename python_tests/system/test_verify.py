"""Verification finds what differs, names it, and says where it cannot compare."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import tiny as t

import s3t_ext
from s3t_ext.cli.main import main
from s3t_ext.ledger import LedgerError
from s3t_ext.lora.kernels import native
from s3t_ext.store.files import StoreError
from s3t_ext.system import heal, unlearn, verify
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.training.train import Trainer

pytestmark = pytest.mark.usefixtures("warm_processes")


@pytest.fixture
def raw(mlp, tmp_path):
    mlp.table.save(tmp_path / "table.npz", mlp.schema)
    return tmp_path / "table.npz"


def run(store, raw, nodes="all"):
    return s3t_ext.verify(store, raw, nodes, progress=False)


def test_a_good_store_has_no_differences_before_and_after_deletions(mlp, store, raw) -> None:
    report = run(store, raw)
    assert (report["nodes"], report["mismatched"], report["incomparable"]) == (14, 0, 0)
    assert (report["depths"], report["shards"]) == ([1, 2, 3], [0, 1])
    s3t_ext.delete(store, [mlp.table.subjects[0][0], mlp.table.subjects[1][0]])
    report = run(store, raw, 5)
    assert report["mismatched"] == 0
    assert 5 <= report["nodes"] <= report["live"] < 14


@pytest.mark.parametrize("told", ["as theirs", "as another's", "of another's, with a table without them"])
def test_a_store_healed_with_a_deleted_person_is_found_out(mlp, store, monkeypatch, told) -> None:
    """Deleted, and trained on all the same: the nodes of that slice differ, whose ever the store says the rows are."""
    person, other = t.people_by_cell(mlp)[0, 1][:2]
    with StoreFolder(store) as folder:
        kept = folder.records.get(0, 1)
    s3t_ext.delete(store, [person])
    if told != "as theirs":
        kept = replace(kept, subjects=[[other] if names == [person] else names for names in kept.subjects])
    with StoreFolder(store) as folder:
        folder.records.put(0, 1, kept)
    monkeypatch.setattr(heal, "deleted_in", lambda *_: {})
    s3t_ext.heal(store, progress=False)
    table = t.without(mlp.table, {person}) if "without" in told else mlp.table
    assert t.mismatched(store, table) == 4, "of 7 nodes of 3 slices, 4 saw this one"


def test_rows_that_went_with_a_deleted_persons_are_found_out(mlp, store, monkeypatch) -> None:
    """What the deleted said decided which rows of others are left: one that equals theirs is erased too."""
    person, other = t.people_by_cell(mlp)[0, 1][:2]
    s3t_ext.delete(store, [person])
    theirs = {(0, 1): [other]}
    monkeypatch.setattr(
        heal, "deleted_in", lambda folder, cell: {folder.hashed(name): name for name in theirs.get(cell, ())}
    )
    s3t_ext.heal(store, progress=False)
    report = s3t_ext.verify(store, mlp.table, progress=False)
    assert (report["mismatched"], report["other_rows"], report["missing_rows"]) == (4, 2, 0)


def test_a_table_that_lacks_rows_is_told_and_certifies_nothing(mlp, store, tmp_path, capsys) -> None:
    s3t_ext.delete(store, [mlp.table.subjects[0][0]], "r0")
    t.reorder(mlp.table, list(range(2, 60))).save(tmp_path / "less.npz", mlp.schema)
    assert main(["verify", str(store), str(tmp_path / "less.npz"), "--certify"]) == 1
    assert "1 row that the store holds not in the tables, 0 of the tables not" in capsys.readouterr().out
    assert requests(store)["r0"].state == "erased"


def test_same_people_with_another_content_are_compared_and_that_is_told(mlp, store, tmp_path, capsys) -> None:
    inputs = mlp.table.inputs.copy()
    inputs[:3] += 1
    replace(mlp.table, inputs=inputs).save(tmp_path / "other.npz", mlp.schema)
    assert main(["verify", str(store), str(tmp_path / "other.npz"), "--nodes", "2"]) == 1
    assert "3 rows of the tables with another content than the store holds" in capsys.readouterr().out


def test_a_draw_takes_each_shard_in_turn_and_first_those_that_requests_hit() -> None:
    paths = [(0,), (1,), (0, 1), (1, 0)]
    live = [(shard, path) for shard in range(6) for path in paths]
    for seed in range(5):
        few = verify._choose(live, "5", seed, {4, 1})
        assert len({shard for shard, _ in few}) == 5
        assert len(few) == 10, "each with the one above it"
        assert {shard for shard, _ in verify._choose(live, "2", seed, {4, 1})} == {1, 4}
        assert {shard for shard, _ in verify._choose(live, "1", seed, {4, 1})} <= {1, 4}
    assert verify._choose(live, "100", 0, {4}) == sorted(live)


def test_a_flipped_weight_is_named(store, raw) -> None:
    with StoreFolder(store) as folder:
        (shard, path), name = sorted(folder.trained(folder.ledger.slices()).items())[0]
        blob = store / "nodes" / f"{name}.sealed"
    data = bytearray(blob.read_bytes())
    data[-3] ^= 1
    blob.write_bytes(data)
    report = run(store, raw)
    assert report["differing"] == [{"shard": shard, "path": list(path), "node": name}]
    with pytest.raises(StoreError, match=name):
        s3t_ext.Service(store)


def test_other_provenance_is_said_not_compared(store, raw) -> None:
    from s3t_ext.store.files import read_checked, write_checked

    with StoreFolder(store) as folder:
        name = folder.trained(folder.ledger.slices())[0, (0,)]
    manifest = store / "nodes" / f"{name}.json"
    body = read_checked(manifest)
    write_checked(manifest, {**body, "provenance": {**body["provenance"], "torch": "1.0"}})
    report = run(store, raw)
    assert (report["incomparable"], report["mismatched"]) == (1, 0)
    assert "torch: trained with 1.0" in report["reason"]


INFO = native.build_info() if native.AVAILABLE else {"isas": [], "isa": ""}


@pytest.mark.parametrize("isa", [isa for isa in INFO["isas"] if isa != INFO["isa"]])
def test_nodes_are_compared_across_instruction_sets(store, raw, isa, monkeypatch) -> None:
    """S3T_CPU reaches our kernels only, whose fp32 bits are the same on all."""
    monkeypatch.setenv("S3T_CPU", isa)
    report = run(store, raw)
    assert (report["nodes"], report["mismatched"], report["incomparable"]) == (14, 0, 0)


@pytest.mark.skipif(not native.AVAILABLE, reason="S3T_CPU is of the compiled module")
def test_a_bad_instruction_set_is_named_first(store, monkeypatch) -> None:
    monkeypatch.setenv("S3T_CPU", "bogus")
    with pytest.raises(StoreError, match=r"S3T_CPU must name an instruction set of this processor .*portable.*'bogus'"):
        run(store, "no such table")


def test_it_needs_the_table_not_the_stores_records(mlp, store, raw) -> None:
    for file in (store / "records").iterdir():
        file.write_bytes(b"gone")
    assert run(store, raw, 3)["mismatched"] == 0
    inputs = mlp.table.inputs + np.float32(1e-3)
    s3t_ext.system.data.tables.Table(mlp.table.subjects, inputs, mlp.table.labels).save(raw, mlp.schema)
    assert run(store, raw)["mismatched"] == 14


def test_bad_table_is_an_error(store, tmp_path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps({"subject": "x", "input": [1]}) + "\n")
    with pytest.raises(StoreError, match=r"bad.jsonl, row 1"):
        run(store, tmp_path / "bad.jsonl")


def test_a_table_in_memory_with_an_awkward_scale(mlp, tmp_path) -> None:
    schema = replace(mlp.schema, scale=0.1)
    store = replace(mlp, schema=schema).fit(tmp_path / "store")
    assert s3t_ext.verify(store, mlp.table, progress=False)["mismatched"] == 0


@pytest.mark.parametrize("healed", [True, False])
def test_a_deletion_meanwhile_is_no_difference(mlp, store, raw, tmp_path, monkeypatch, healed) -> None:
    train = Trainer.train

    def overtaken(self, wanted, progress):
        monkeypatch.setattr(Trainer, "train", train)
        s3t_ext.delete(store, [mlp.table.subjects[0][0]])
        if healed:
            s3t_ext.heal(store, progress=False)
        return train(self, wanted, progress)

    monkeypatch.setattr(Trainer, "train", overtaken)
    report = verify.compare(str(store), [str(raw)], "all", 0, False, str(tmp_path / "fresh"))
    assert (report["nodes"], report["mismatched"], report["incomparable"]) == (10, 0, 0)


def test_copies_that_a_killed_run_left_are_destroyed(mlp, store, raw, tmp_path) -> None:
    """Private records beside the store do not outlive the next run, nor the run itself."""
    command = [sys.executable, "-m", "s3t_ext.cli.main", "verify", str(store), str(raw)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".store.*.part/*")) and child.poll() is None:
        time.sleep(0.005)
    assert child.poll() is None, "it ended before it could be killed"
    child.kill()
    child.wait()
    assert list(tmp_path.glob(".store.*.part"))
    run(store, raw, 1)
    assert not list(tmp_path.glob(".store.*.part"))


def test_another_table_is_refused(mlp, store, tmp_path) -> None:
    other = t.make(tmp_path / "other", people=40)
    with pytest.raises(StoreError, match="whom the store does not hold"):
        s3t_ext.verify(store, other.table, progress=False)


def test_a_broken_ledger_is_one_line(store, raw) -> None:
    (store / "epoch").unlink()
    with pytest.raises((StoreError, LedgerError), match="epoch"):
        run(store, raw)


def certified(store, raw, nodes="all"):
    return s3t_ext.verify(store, raw, nodes, certify=True, progress=False)


def requests(store):
    with StoreFolder(store) as folder:
        return {request.request_id: request for request in folder.ledger.requests()}


def test_what_was_compared_certifies_the_erased_requests(mlp, store, raw) -> None:
    for index in (0, 1):
        s3t_ext.delete(store, [mlp.table.subjects[index][0]], f"r{index}")
    report = certified(store, raw, 8)
    assert (report["certified"], report["uncertified"]) == (["r0", "r1"], {})
    evidence = requests(store)["r0"].evidence
    assert evidence == {
        "sample": "8",
        "seed": 0,
        "tables": [hashlib.sha256(raw.read_bytes()).hexdigest()],
        "nodes": report["nodes"],
        "live": report["live"],
        "shards": [0, 1],
        "incomparable": 0,
        **dict.fromkeys(("changed_rows", "missing_rows", "other_rows"), 0),
        "provenance": report["provenance"],
    }
    s3t_ext.delete(store, [mlp.table.subjects[2][0]], "r2")
    assert {name: request.state for name, request in requests(store).items()} == {
        "r0": "certified", "r1": "certified", "r2": "erased"
    }  # fmt: skip
    s3t_ext.delete(store, sorted({name for names in mlp.table.subjects for name in names}), "everybody")
    report = certified(store, raw)
    assert (report["live"], report["certified"]) == (0, [])
    assert report["uncertified"] == dict.fromkeys(("r2", "everybody"), "no node was compared")


def test_only_what_was_compared_in_each_live_shard_is_certified(mlp, store, raw, capsys) -> None:
    cells = t.people_by_cell(mlp)
    for shard in (0, 1):
        s3t_ext.delete(store, [cells[shard, 1][0]], f"r{shard}")
    s3t_ext.delete(store, [cells[0, 1][1], cells[1, 1][1]], "both")
    s3t_ext.delete(store, ["a stranger"], "held nowhere")
    assert main(["verify", str(store), str(raw), "--nodes", "1", "--certify", "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    (compared,), missed = report["shards"], {0, 1} - set(report["shards"])
    why = f"no node of shards {list(missed)} was compared"
    assert report["certified"] == [f"r{compared}", "held nowhere"]
    assert report["uncertified"] == {f"r{missed.pop()}": why, "both": why}
    assert main(["verify", str(store), str(raw), "--nodes", "1", "--certify"]) == 2
    assert f"certified: 0 requests\n  not certified: r{1 - compared}: {why}\n  not cert" in capsys.readouterr().out
    s3t_ext.delete(store, [people[0] for (s, _), people in cells.items() if s != compared], "the other shard")
    assert main(["verify", str(store), str(raw), "--certify"]) == 2
    assert f"no live node is left in shards [{1 - compared}]; `s3t heal`" in capsys.readouterr().out
    s3t_ext.heal(store, progress=False)
    assert main(["verify", str(store), str(raw), "--certify"]) == 0
    assert {request.state for request in requests(store).values()} == {"certified"}


def test_nothing_is_certified_on_a_difference_or_before_erasure(mlp, store, raw, monkeypatch) -> None:
    s3t_ext.delete(store, [mlp.table.subjects[0][0]], "r0")
    with monkeypatch.context() as broken:
        broken.setattr(verify, "in_fresh_process", lambda *_: {**NOTHING, "nodes": 3, "live": 9, "mismatched": 1})
        report = certified(store, raw)
        assert (report["certified"], report["uncertified"]) == ([], {"r0": "1 node not equal"})
        broken.setattr(verify, "in_fresh_process", lambda *_: {**NOTHING, "nodes": 0, "live": 9, "incomparable": 9})
        report = certified(store, raw)
        assert (report["certified"], report["uncertified"]) == ([], {"r0": "no node was compared"})
        broken.setattr(verify, "residue", lambda *_: {"r0": ["nodes/ab"]})
        with pytest.raises(ValueError, match=r"nothing to be left of any request, got .*nodes/ab"):
            certified(store, raw)
    with StoreFolder(store) as folder:
        unlearn.delete_from(folder, [mlp.table.subjects[1][0]], "pending")
    with pytest.raises(ValueError, match="certify: expected every request to be erased, got pending ones: pending"):
        certified(store, raw)
    assert [request.state for request in requests(store).values()] == ["erased", "applied"]


NOTHING = {
    "mismatched": 0,
    "shards": [0, 1],
    "incomparable": 0,
    "provenance": "0" * 64,
    **dict.fromkeys(verify.ROWS, 0),
}
