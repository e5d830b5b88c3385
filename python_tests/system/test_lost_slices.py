"""One slice whose records cannot be read: all others are erased, healed and backed up, and nothing is claimed of it."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import tiny as t
from points import meeting

import s3t_ext
from s3t_ext.cli.main import main
from s3t_ext.ledger import Key, place
from s3t_ext.store.files import StoreError
from s3t_ext.store.records import Lost
from s3t_ext.system import unlearn, verify, wording
from s3t_ext.system.backup import backup
from s3t_ext.system.data.tables import Table
from s3t_ext.system.evidence.residue import residue
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.heal import heal
from s3t_ext.system.report import report as report_of
from s3t_ext.system.restore import restore
from s3t_ext.system.unlearn import erase_pending, writing

QUICK = {"steps": 1, "rank": 1}
LOST, OTHER = (0, 0), (1, 1)


@pytest.fixture
def gone(mlp) -> dict[str, str]:
    """Name somebody of the slice that will be lost, and somebody of another."""
    people = t.people_by_cell(mlp)
    return {"r-lost": people[LOST][0], "r-other": people[OTHER][0]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return t.make(place := tmp_path_factory.mktemp("whole")).fit(place / "store", **QUICK)


@pytest.fixture
def store(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "store")
    for kind in ("key", "anchor"):
        shutil.copy(whole.with_name(f"store.{kind}"), tmp_path)
    return tmp_path / "store"


@pytest.fixture(params=["missing", "damaged"])
def lost(request, store, tmp_path, gone) -> Path:
    """Give a store whose slice was lost before two people were deleted; its whole records lie beside it."""
    file = store / "records" / "0-0.sealed"
    shutil.copy(file, tmp_path / "whole")
    file.unlink() if request.param == "missing" else file.write_bytes(b"damaged")
    waits = "not erased yet: request r-lost: .*The records of slice 0-0: `s3t restore"
    for request, name in gone.items():
        with pytest.warns(UserWarning, match=waits) as told:
            s3t_ext.delete(store, [name], request)
        assert "r-other" not in str(told[0].message), "which is erased"
    return store


def states(store) -> dict[str, str]:
    with StoreFolder(store) as folder:
        return {request.request_id: request.state for request in folder.ledger.requests()}


def certified(mlp, store, monkeypatch) -> dict:
    """Verify and certify without the fresh process, and its time."""

    def here(module, task, scratch):
        return verify.compare(str(store), [mlp.table], "2", 0, False, task["scratch"])

    monkeypatch.setattr(verify, "in_fresh_process", here)
    return verify.verify(store, mlp.table, 2, certify=True, progress=False)


def test_all_other_slices_are_erased_healed_and_backed_up(mlp, lost, gone, tmp_path, capsys, monkeypatch) -> None:
    assert states(lost) == {"r-lost": "applied", "r-other": "erased"}
    assert main(["erase", str(lost)]) == 1
    assert "pending, until what is lost is back, or given up: r-lost" in capsys.readouterr().out
    assert main(["heal", str(lost), "--dry-run"]) == 1
    foretold = capsys.readouterr().out
    assert main(["heal", str(lost)]) == 1
    out = capsys.readouterr()
    assert out.out.count("slice 0-0 is lost") == foretold.count("slice 0-0 is lost") == 1
    assert "warning" not in out.err, "said once"
    status = s3t_ext.status(lost)
    assert (status["dirty"], status["depths"]) == ([[0, 0]], [2, 3])
    assert status["healing"]["nodes"] == 0, "nothing that healing could do is left"
    assert "`s3t erase STORE --lost 0-0`" in status["lost_slices"]["0-0"]
    assert main(["status", str(lost)]) == 1
    table = t.without(mlp.table, set(gone.values()))
    fresh = t.weights(mlp.fit(tmp_path / "fresh", table, **QUICK))
    assert t.weights(lost) == {node: digest for node, digest in fresh.items() if node[0] == 1 or 0 not in node[1]}
    assert main(["backup", str(lost), str(tmp_path / "copy")]) == 1
    assert not (tmp_path / "copy" / "records" / "0-0.sealed").exists()
    report = certified(mlp, lost, monkeypatch)
    assert (report["certified"], report["mismatched"]) == (["r-other"], 0)
    assert report["uncertified"] == {"r-lost": "not erased: slice 0-0, which is lost"}
    shutil.copy(tmp_path / "whole", lost / "records" / "0-0.sealed")
    assert main(["heal", str(lost)]) == 0
    assert (t.weights(lost), states(lost)["r-lost"]) == (fresh, "erased")


def test_a_lost_slice_of_which_nobody_asked_is_found_by_healing(mlp, store, tmp_path, gone) -> None:
    s3t_ext.delete(store, [t.people_by_cell(mlp)[0, 1][0], gone["r-other"]])
    before = set(t.weights(store))
    (store / "records" / "0-0.sealed").write_bytes(b"damaged")
    report = heal(store, progress=False)
    assert (report["healed"], list(report["lost_slices"])) == ([[0, 1], [1, 1]], ["0-0"])
    fresh = t.without(mlp.table, {t.people_by_cell(mlp)[0, 1][0], gone["r-other"]})
    expected = t.weights(mlp.fit(tmp_path / "fresh", fresh, **QUICK))
    others = {node for node in expected if node[0] == 1 or 0 not in node[1]}
    assert t.weights(store) == {node: digest for node, digest in expected.items() if node in others | before}
    assert report["nodes"] == len(others - before)


def test_a_slice_that_is_given_up_is_on_record_and_never_certified(mlp, lost, tmp_path, capsys, monkeypatch) -> None:
    missing = not (lost / "records" / "0-0.sealed").exists()
    for wrong in ("0-1", "9-9", "0", "0-0-0"):
        assert main(["erase", str(lost), "--lost", wrong]) == 2
    assert states(lost)["r-lost"] == "applied"
    backup(lost, tmp_path / "copy")
    assert main(["erase", str(lost), "--lost", "0-0"]) == 0
    file = "missing, nothing was left to overwrite" if missing else "damaged, overwritten unread"
    out = capsys.readouterr().out
    assert f", file {file}: what 4 subjects had in it is in no answer and no node" in out
    assert "no request on it that was erased since (r-lost) is certified" in out
    assert not (lost / "records" / "0-0.sealed").exists()
    (told,) = s3t_ext.status(lost)["given_up"].items()
    assert (told[0], told[1].pop("time") > "20", told[1]) == (
        "0-0", True, {"file": file, "subjects": 4, "requests": ["r-lost"]},
    )  # fmt: skip
    with StoreFolder(lost) as folder:  # opened anew, from its events
        assert [r.unseen for r in folder.ledger.requests()] == [((0, 0, file),), ()]
    report = certified(mlp, lost, monkeypatch)
    assert report["uncertified"] == {"r-lost": "nobody can look into slice 0-0, which is lost"}
    assert report["certified"] == ["r-other"]
    shutil.copy(tmp_path / "whole", lost / "records" / "0-0.sealed")
    assert main(["erase", str(lost)]) == 0, "an old copy that comes back is emptied of them"
    assert "was there again of request r-lost: records/0-0" in capsys.readouterr().out
    assert heal(lost, progress=False)["healed"] == [[0, 0], [1, 1]]
    report = certified(mlp, lost, monkeypatch)
    assert (report["certified"], report["mismatched"]) == (["r-lost"], 0), "it can be looked into"
    assert main(["status", str(lost)]) == 0
    assert "given up" not in capsys.readouterr().out
    (lost / "records" / "0-0.sealed").write_bytes(b"damaged")
    capsys.readouterr()
    assert main(["erase", str(lost)]) == 1, "nobody can tell what is in it now"
    assert "slice 0-0 is lost" in capsys.readouterr().out


def given_up(store: Path, damaged: bool = True) -> str:
    """Lose a slice of which nobody asked, and give it up; return the line that tells of it."""
    file = store / "records" / "0-0.sealed"
    file.write_bytes(b"damaged") if damaged else file.unlink()
    assert main(["erase", str(store), "--lost", "0-0"]) == 0
    (line,) = wording.told(s3t_ext.status(store))
    return line


def test_what_nobody_asked_about_is_given_up_on_record_once(mlp, store, gone, tmp_path, capsys, monkeypatch) -> None:
    before = t.weights(store)
    shutil.copy(store / "records" / "0-0.sealed", tmp_path / "whole")
    with s3t_ext.Service(store) as service:
        line = given_up(store)
        answer = service.predict(mlp.table.inputs[:1])
    others = {node: digest for node, digest in before.items() if node[0] == 1 or 0 not in node[1]}
    assert t.weights(store) == others, "as if everybody in it had been deleted from it"
    assert len(list((store / "nodes").glob("*.json"))) == len(others)
    with StoreFolder(store) as folder:
        seq, entry = folder.ledger.seq, folder.ledger.given_up()[LOST]
        assert set(answer.nodes) <= set(folder.trained(folder.ledger.slices()).values())
    assert line.startswith(f"slice 0-0 was given up at {entry.time}, file damaged, overwritten unread: what 4 subjects")
    assert "no request on it that was erased since is certified" in line
    capsys.readouterr()
    for command in (["erase", "--lost", "0-0"], ["status"], ["heal"], ["backup", str(tmp_path / "copy")], ["erase"]):
        assert main([command[0], str(store), *command[1:]]) == 0, command
        out = capsys.readouterr()
        assert out.err == ""
        assert ("slice 0-0 was given up before, and nothing new is on record" in out.out) == (len(command) == 3)
        assert (line in out.out) == (len(command) == 3 or command == ["status"])
        with StoreFolder(store) as folder:
            assert folder.ledger.seq == seq + (command[0] == "backup")
            seq = folder.ledger.seq
    assert main(["report", str(store), str(tmp_path / "page")]) == 0
    assert line in (tmp_path / "page" / "report.md").read_text()
    receipt = s3t_ext.delete(store, [gone["r-lost"]], "r-lost")
    assert [row["status"] for row in receipt["subjects"]] == ["deleted"]
    assert states(store) == {"r-lost": "erased"}, "without a warning: nothing more is to be waited for"
    assert s3t_ext.status(store)["given_up"]["0-0"]["requests"] == ["r-lost"]
    report = certified(mlp, store, monkeypatch)
    assert (report["mismatched"], report["certified"]) == (0, [])
    assert report["uncertified"] == {"r-lost": "nobody can look into slice 0-0, which is lost"}
    assert heal(store, progress=False)["left"]["nodes"] == 0, "of what can be trained"
    assert s3t_ext.status(store)["healing"] == {"slices": 0, "nodes": 0, "slice_passes": 0, "depths_after": [2, 3]}
    (store / "records" / "1-0.sealed").unlink()
    report = restore(tmp_path / "copy", store)
    assert (report["records"], report["missing"], report["lost_slices"]) == (1, 0, {})
    (store / "records" / "0-0.sealed").write_bytes(b"damaged again")
    assert main(["status", str(store)]) == 1, "what it is now nobody has said"
    assert main(["erase", str(store), "--lost", "0-0"]) == 0
    assert wording.told(s3t_ext.status(store))[0].startswith(line.partition(" is certified")[0])
    shutil.copy(tmp_path / "whole", store / "records" / "0-0.sealed")
    assert main(["erase", str(store), "--lost", "0-0"]) == 2, "it can be read"
    assert heal(store, progress=False)["healed"] == [[0, 0]]
    fresh = mlp.fit(tmp_path / "fresh", t.without(mlp.table, {gone["r-lost"]}), **QUICK)
    assert t.weights(store) == t.weights(fresh)
    assert s3t_ext.status(store)["given_up"] == {}
    (store / "records" / "0-0.sealed").unlink()
    assert list(restore(tmp_path / "copy", store)["lost_slices"]) == ["0-0"], "it was given up when that was made"


def test_a_lost_slice_stops_fitting_until_it_is_given_up(mlp, lost, gone, tmp_path) -> None:
    def again(table=mlp.table, **how) -> dict:
        return s3t_ext.fit(lost, table, progress=False, **how)

    new = replace(mlp.table, subjects=[(f"new {names[0]}",) for names in mlp.table.subjects])
    page = report_of(lost, tmp_path / "page")["report"]
    assert "slice 0-0 is lost: " in Path(page).read_text()
    for how in ({}, {"grow": True}):
        with pytest.raises(Lost, match="`s3t erase STORE --lost 0-0` gives it up, and what was trained on it"):
            again(**how)
    assert main(["erase", str(lost), "--lost", "0-0"]) == 0
    live = t.weights(lost)
    out = {*t.people_by_cell(mlp)[LOST], gone["r-other"]}
    assert (again()["trained"], again()["records"]) == (0, sum(names[0] not in out for names in mlp.table.subjects))
    assert again(grow=True)["generations"] == 1, "the table is known all the same"
    stranger = next(name for name in map("new {}".format, range(99)) if place(Key(t.KEY), name, 2, 3) == LOST)
    with pytest.raises(ValueError, match="table: expected the records that the store was made from, got 1 others"):
        again(replace(mlp.table, subjects=[(stranger,), *mlp.table.subjects[1:]]))
    assert again(new, grow=True)["trained"] == 14
    assert t.weights(lost).items() > live.items()
    heal(lost, progress=False)
    assert t.mismatched(lost, mlp.table, new) == 0


def test_a_store_of_given_up_slices_alone_takes_the_same_people_again(mlp, tmp_path) -> None:
    store = mlp.fit(tmp_path / "store", shards=1, slices=1, **QUICK)
    given_up(store)
    assert s3t_ext.fit(store, mlp.table, progress=False)["records"] == 0
    report = s3t_ext.fit(store, mlp.table, progress=False, grow=True)
    assert (report["generations"], report["trained"]) == (2, 1)


class _Stopped(Exception):
    """The run ends here."""


@pytest.mark.filterwarnings("ignore:acknowledged, but not erased yet")
@pytest.mark.parametrize("meanwhile", ["a kill", "a request"])
def test_giving_up_leaves_nothing_whatever_happens_meanwhile(whole, gone, ram, capsys, meanwhile) -> None:
    """Once a request counts as erased; and a repeated command goes on."""

    def happen(point: str) -> None:
        if meanwhile == "a kill":
            raise _Stopped
        s3t_ext.delete(store, [gone["r-lost"]], "r-lost")

    store = ram / "store"
    for nth in range(1, 1000):
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(whole, store)
        for kind in ("key", "anchor"):
            shutil.copy(whole.with_name(f"store.{kind}"), ram)
        (store / "records" / "0-0.sealed").write_bytes(b"damaged")
        with meeting(nth, happen) as met, suppress(_Stopped), StoreFolder(store) as folder, writing(folder):
            unlearn.give_up(folder, [LOST])
        s3t_ext.delete(store, [gone["r-lost"]], "r-lost")
        with StoreFolder(store) as folder:
            assert states(store)["r-lost"] == "applied" or not residue(folder), met[-1]
        assert main(["erase", str(store), "--lost", "0-0"]) == 0
        assert states(store) == {"r-lost": "erased"}
        assert [*s3t_ext.status(store)["given_up"]["0-0"].values()][1:] == [
            "damaged, overwritten unread", 4, ["r-lost"]
        ]  # fmt: skip
        if len(met) < nth:
            break
    with capsys.disabled():
        print(f"\npoints of giving up: {len(met)}")
    assert len(met) > 10


def test_a_backup_without_the_slice_restores_all_else(mlp, lost, tmp_path) -> None:
    assert list(backup(lost, tmp_path / "copy")["lost_slices"]) == ["0-0"]
    shutil.rmtree(lost / "nodes")
    (lost / "records" / "1-0.sealed").unlink()
    report = restore(tmp_path / "copy", lost)
    assert (report["records"], list(report["lost_slices"])) == (1, ["0-0"])
    assert states(lost) == {"r-lost": "applied", "r-other": "erased"}
    assert s3t_ext.status(lost)["depths"] == [2, 2]


def test_a_damaged_slice_of_which_nobody_asked_goes_into_no_backup(store, tmp_path, monkeypatch) -> None:
    (store / "records" / "0-0.sealed").write_bytes(b"damaged")
    assert list(backup(store, tmp_path / "copy")["lost_slices"]) == ["0-0"]
    monkeypatch.setattr("s3t_ext.system.backup.losses", lambda folder, look: {})  # as backups of before were made
    backup(store, tmp_path / "old copy")
    for name in ("copy", "old copy"):
        (store / "records" / "1-0.sealed").unlink()
        report = restore(tmp_path / name, store)
        assert (report["records"], list(report["lost_slices"])) == (1, ["0-0"])


def test_an_absent_folder_of_records_is_not_given_up(lost, tmp_path, capsys) -> None:
    (lost / "records").rename(tmp_path / "unmounted")
    assert main(["erase", str(lost), "--lost", "0-0"]) == 2
    assert "records is missing as a whole: nothing was given up" in capsys.readouterr().err
    assert states(lost)["r-lost"] == "applied"


@pytest.mark.filterwarnings("ignore:acknowledged, but not erased yet")
def test_nothing_counts_as_lost_while_the_store_key_is_missing(lost, tmp_path) -> None:
    (tmp_path / "store.key").rename(tmp_path / "aside")
    assert s3t_ext.status(lost)["lost_slices"] == {}
    for act in (heal, lambda store, **_: backup(store, tmp_path / "copy")):
        with pytest.raises(StoreError, match=r"the store key \w+\.\.\. is missing"):
            act(lost, progress=False)
    (tmp_path / "aside").rename(tmp_path / "store.key")
    with StoreFolder(lost) as folder:
        (lost / "store.json").rename(tmp_path / "aside")
        with pytest.raises(StoreError) as caught:
            folder.records.get(0, 0)
    assert not isinstance(caught.value, Lost)


def test_a_waiting_request_does_not_erase_what_was_healed_to_the_same_bits(mlp, tmp_path, gone) -> None:
    """Whose only record in a slice went before with its owner: the slice is healed to the digest that it had."""
    row = next(i for i, names in enumerate(mlp.table.subjects) if names == (gone["r-other"],))
    subjects = [(*names, "guest") if i == row else names for i, names in enumerate(mlp.table.subjects)]
    shared = replace(mlp, table=Table(subjects, mlp.table.inputs, mlp.table.labels))
    store = shared.fit(tmp_path / "store", **QUICK)
    s3t_ext.delete(store, [gone["r-other"]])
    heal(store, progress=False)
    before = t.weights(store)
    (store / "records" / "0-0.sealed").unlink()
    with pytest.warns(UserWarning, match="not erased yet"):
        dead = s3t_ext.delete(store, [gone["r-lost"], "guest"], "both")["shards"]
    heal(store, progress=False)
    with StoreFolder(store) as folder:
        live = set(folder.trained(folder.ledger.slices()).values())
        assert live & {name for shard in dead for name in shard["dead"]}, "the ids are back"
        assert erase_pending(folder)
        assert set(folder.trained(folder.ledger.slices()).values()) == live
        assert residue(folder) == {}
    assert t.weights(store) == {node: digest for node, digest in before.items() if node[0] == 1 or 0 not in node[1]}
