"""A lost slice that an operator gave up: on record once, never certified, and nothing of it is left, kill or not."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import losing
import numpy as np
import pytest
import tiny as t
from losing import LOST, QUICK, certified, states
from points import meeting

import s3t_ext
from s3t_ext.cli.main import main
from s3t_ext.ledger import Key, place
from s3t_ext.store.records import Lost
from s3t_ext.system import unlearn, wording
from s3t_ext.system.backup import backup
from s3t_ext.system.evidence.residue import residue
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.heal import heal
from s3t_ext.system.report import report as report_of
from s3t_ext.system.restore import restore
from s3t_ext.system.serve import Refused
from s3t_ext.system.unlearn import writing


@pytest.fixture
def store(quick, tmp_path) -> Path:
    return losing.copy(quick, tmp_path)


def test_a_slice_that_is_given_up_is_on_record_and_never_certified(mlp, lost, tmp_path, capsys, monkeypatch) -> None:
    missing = not (lost / "records" / "0-0.sealed").exists()
    for wrong in ("0-1", "9-9", "0", "0-0-0"):
        assert main(["erase", str(lost), "--lost", wrong]) == 2
    assert states(lost)["r-lost"] == "applied"
    backup(lost, tmp_path / "copy")
    assert main(["erase", str(lost), "--lost", "0-0"]) == 0
    file = "missing" if missing else "damaged"
    out = capsys.readouterr().out
    assert f", file {file}: what 4 subjects had in it is in no answer, as if deleted" in out
    assert "no request that is erased without a look into it (r-lost) is certified" in out
    assert not (lost / "records" / "0-0.sealed").exists()
    (told,) = s3t_ext.status(lost)["given_up"].items()
    assert (told[0], told[1].pop("time") > "20", told[1]) == (
        "0-0", True, {"file": file, "subjects": 4, "requests": ["r-lost"]},
    )  # fmt: skip
    with StoreFolder(lost) as folder:  # opened anew, from its events
        assert [r.unseen for r in folder.ledger.requests()] == [((0, 0, file),), ()]
    unseen = {"r-lost": "nobody looked into slice 0-0, which is given up, until it is back and healed"}
    report = certified(mlp, lost, monkeypatch)
    assert (report["uncertified"], report["certified"]) == (unseen, ["r-other"])
    shutil.copy(tmp_path / "whole", lost / "records" / "0-0.sealed")
    assert main(["erase", str(lost)]) == 0, "an old copy that comes back is emptied of them"
    assert "was there again of request r-lost: records/0-0" in capsys.readouterr().out
    report = certified(mlp, lost, monkeypatch)
    assert (report["uncertified"], report["certified"]) == (unseen, []), "it may go again, and nobody could tell"
    assert s3t_ext.status(lost)["given_up"]["0-0"]["requests"] == ["r-lost"]
    assert heal(lost, progress=False)["healed"] == [[0, 0], [1, 1]]
    report = certified(mlp, lost, monkeypatch)
    assert (report["certified"], report["mismatched"]) == (["r-lost"], 0), "it can be looked into"
    assert main(["status", str(lost)]) == 0
    assert "given up" not in capsys.readouterr().out
    (lost / "records" / "0-0.sealed").write_bytes(b"damaged")
    capsys.readouterr()
    assert main(["erase", str(lost)]) == 1, "nobody can tell what is in it now"
    assert "slice 0-0 is lost" in capsys.readouterr().out
    assert main(["erase", str(lost), "--lost", "0-0"]) == 0
    assert s3t_ext.status(lost)["given_up"]["0-0"]["requests"] == [], "r-lost is certified"


def given_up(store: Path, damaged: bool = True) -> str:
    """Lose a slice, and give it up; return the line that tells of it."""
    file = store / "records" / "0-0.sealed"
    file.write_bytes(b"damaged") if damaged else file.unlink(missing_ok=True)
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
    assert line.startswith(f"slice 0-0 was given up at {entry.time}, file damaged: what 4 subjects")
    assert "no request that is erased without a look into it is certified" in line
    capsys.readouterr()
    for command in (["erase", "--lost", "0-0"], ["status"], ["heal"], ["backup", str(tmp_path / "copy")], ["erase"]):
        assert main([command[0], str(store), *command[1:]]) == 0, command
        out = capsys.readouterr()
        assert out.err == ""
        assert ("slice 0-0 was given up before, and nothing new is on record" in out.out) == (len(command) == 3)
        assert (line in out.out) == (len(command) == 3 or command == ["status"])
        assert ("nothing is trained on what was given up, slice 0-0" in out.out) == (command == ["heal"])
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
    assert list(report["uncertified"]) == ["r-lost"]
    assert heal(store, progress=False)["left"]["nodes"] == 0, "of what can be trained"
    assert s3t_ext.status(store)["healing"] == {"slices": 0, "nodes": 0, "slice_passes": 0, "depths_after": [2, 3]}
    (store / "records" / "1-0.sealed").unlink()
    report = restore(tmp_path / "copy", store)
    assert (report["records"], report["missing"], report["lost_slices"]) == (1, 0, {})
    (store / "records" / "0-0.sealed").write_bytes(b"damaged again")
    assert main(["status", str(store)]) == 0, "it is given up as before"
    assert heal(store, budget=0, progress=False)["not_trained_on"] == ["0-0"]
    assert not (store / "records" / "0-0.sealed").exists(), "and overwritten unread"
    assert wording.told(s3t_ext.status(store)) == [line.replace("into it is", "into it (r-lost) is")]
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


def test_a_slice_that_is_lost_again_stands_for_no_request_from_before(mlp, lost, tmp_path, monkeypatch) -> None:
    """That was looked into when it was healed: it may be certified, then or now."""
    given_up(lost, damaged=False)
    shutil.copy(tmp_path / "whole", lost / "records" / "0-0.sealed")
    heal(lost, progress=False)
    assert "a look into it is certified" in given_up(lost, damaged=False)
    report = certified(mlp, lost, monkeypatch)
    assert (report["certified"], report["uncertified"]) == (["r-lost", "r-other"], {})


def test_the_record_says_how_a_file_was_found(store, gone, capsys) -> None:
    """When the slice was given up: what lies there later, damaged, is overwritten beside it."""
    line = given_up(store, damaged=False)
    (store / "records" / "0-0.sealed").write_bytes(b"damaged")
    s3t_ext.delete(store, [gone["r-lost"]], "r-lost")
    assert states(store) == {"r-lost": "erased"}
    assert not (store / "records" / "0-0.sealed").exists()
    with StoreFolder(store) as folder:
        assert [request.unseen for request in folder.ledger.requests()] == [((*LOST, "missing"),)]
    capsys.readouterr()
    assert main(["erase", str(store), "--lost", "0-0"]) == 0
    assert line.partition(" is certified")[0].removesuffix("it") in capsys.readouterr().out
    assert "file missing" in line


def test_what_an_earlier_version_gave_up_is_told_and_put_on_record(lost, gone, tmp_path, capsys) -> None:
    """It entered the slice with the requests that waited, and nowhere else."""
    (lost / "records" / "0-0.sealed").unlink(missing_ok=True)
    with StoreFolder(lost) as folder:
        (seq,) = (request.seq for request in folder.ledger.unerased())
        folder.ledger.mark_erased([seq], {LOST: "missing, nothing was left to overwrite"})
    assert main(["status", str(lost)]) == 1, "it is lost still"
    out = capsys.readouterr().out
    assert "slice 0-0 is lost: " in out
    assert "slice 0-0 was given up before, file missing, nothing was left to overwrite, for requests alone" in out
    assert "(r-lost), which are not certified until it is back and healed; `s3t erase STORE --lost 0-0` once" in out
    shutil.copy(tmp_path / "whole", lost / "records" / "0-0.sealed")
    assert wording.told(s3t_ext.status(lost)) == [], "healing is all it takes"
    (lost / "records" / "0-0.sealed").unlink()
    line = given_up(lost, damaged=False)
    assert "file missing: what 3 subjects" in line, "less r-lost, which is erased"
    assert "a look into it (r-lost) is certified" in line
    with StoreFolder(lost) as folder:
        folder.ledger.certify([seq], {})  # as they did once it was back
    assert s3t_ext.status(lost)["given_up"]["0-0"]["requests"] == []
    shutil.copy(tmp_path / "whole", lost / "records" / "0-0.sealed")
    heal(lost, progress=False)
    assert wording.told(s3t_ext.status(lost)) == []


def test_what_is_trained_again_stays_and_half_a_node_goes(store, tmp_path) -> None:
    """Of two slices that were given up at once, when one is back with the digest that it had."""
    before, files = t.weights(store), [store / "records" / f"0-{slice_}.sealed" for slice_ in (0, 1)]
    with StoreFolder(store) as folder:
        ids = folder.trained(folder.ledger.slices())
    half = store / "nodes" / f"{next(name for node, name in ids.items() if node[0] == 0 and 0 in node[1])}.sealed"
    shutil.copy(half, tmp_path / "half")
    for file in files:
        file.rename(tmp_path / file.name)
    assert main(["erase", str(store), "--lost", "0-0", "--lost", "0-1"]) == 0
    shutil.copy(tmp_path / "0-1.sealed", files[1])
    shutil.copy(tmp_path / "half", half)
    heal(store, progress=False)
    assert not half.exists(), "no manifest names it, and what it holds saw the other one"
    heal(store, progress=False)
    assert t.weights(store) == {node: digest for node, digest in before.items() if node[0] == 1 or 0 not in node[1]}


class _Stopped(Exception):
    """The run ends here."""


@pytest.mark.filterwarnings("ignore:acknowledged, but not erased yet")
@pytest.mark.parametrize("meanwhile", ["a kill", "a kill, then healing", "a request"])
def test_giving_up_leaves_nothing_whatever_happens_meanwhile(quick, gone, ram, capsys, meanwhile) -> None:
    """Once a request counts as erased; and a repeated command goes on."""

    def happen(point: str) -> None:
        if "a kill" in meanwhile:
            raise _Stopped
        s3t_ext.delete(store, [gone["r-lost"]], "r-lost")

    store = ram / "store"
    for nth in range(1, 1000):
        shutil.rmtree(store, ignore_errors=True)
        losing.copy(quick, ram)
        (store / "records" / "0-0.sealed").write_bytes(b"damaged")
        with meeting(nth, happen) as met, suppress(_Stopped), StoreFolder(store) as folder, writing(folder):
            unlearn.give_up(folder, [LOST])
        if "healing" in meanwhile:  # which ends it, without a request and a word
            heal(store, budget=0, progress=False)
            with StoreFolder(store) as folder:
                assert not folder.ledger.given_up() or not folder.records.has(*LOST), met[-1]
                assert residue(folder, {}) == {}, met[-1]
        s3t_ext.delete(store, [gone["r-lost"]], "r-lost")
        with StoreFolder(store) as folder:
            assert states(store)["r-lost"] == "applied" or not residue(folder), met[-1]
        assert main(["erase", str(store), "--lost", "0-0"]) == 0
        assert states(store) == {"r-lost": "erased"}
        assert [*s3t_ext.status(store)["given_up"]["0-0"].values()][1:] == ["damaged", 4, ["r-lost"]]
        if len(met) < nth:
            break
    with capsys.disabled():
        print(f"\npoints of giving up: {len(met)}")
    assert len(met) > 10


@pytest.mark.parametrize("point", ["absent", "empty"])
def test_records_of_which_no_file_is_there_are_not_given_up(lost, tmp_path, capsys, point) -> None:
    (lost / "records").rename(tmp_path / "unmounted")
    if point == "empty":
        (lost / "records").mkdir()
    slices = [f"{shard}-{slice_}" for shard in (0, 1) for slice_ in (0, 1, 2)]
    everything = ["erase", str(lost), *(word for name in slices for word in ("--lost", name))]
    for words in (everything[:4], everything):
        assert main(words) == 2
        assert "records has no file of any slice: nothing was given up; mount it, or" in capsys.readouterr().err
        assert (states(lost)["r-lost"], s3t_ext.status(lost)["given_up"]) == ("applied", {})
    (lost / "records").mkdir(exist_ok=True)
    (lost / "records" / "0-0.sealed").touch()
    assert main(everything) == 0
    assert "depths [2, 2] became [0, 0]" in capsys.readouterr().out
    assert states(lost)["r-lost"] == "erased"
    assert [*(lost / "records").iterdir()] == [*(lost / "nodes").glob("*.json")] == []
    assert main(["heal", str(lost)]) == 0
    assert "nothing is trained on what was given up, slice 0-0, 0-1, 0-2, 1-0, 1-1, 1-2" in capsys.readouterr().out
    with s3t_ext.Service(lost) as service, pytest.raises(Refused, match="slices that were given up; `s3t restore`"):
        service.predict(np.zeros((1, 6), np.float32))
