"""Erasure: nothing of a deleted record in any file, opened with every key at hand, and nothing of anybody in plain.

The counts are printed (`pytest -rP`).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny as t

import s3t_ext
from s3t_ext.cli.main import main
from s3t_ext.store.crypt import StoreKey, seal
from s3t_ext.store.files import StoreError, exclusive
from s3t_ext.system import verify
from s3t_ext.system.data.tables import Table
from s3t_ext.system.evidence.residue import residue, scan
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.serve import Service
from s3t_ext.system.training import lockstep, train
from s3t_ext.system.unlearn import rotate

GONE = ("person 3", "person 7", "jörg müller", "person 11")


@pytest.fixture
def named(tiny) -> t.Tiny:
    """Give a table in which one person's name is not ASCII."""
    table = tiny.table
    subjects = [("Jörg  Müller",) if names == ("person 5",) else names for names in table.subjects]
    return replace(tiny, table=Table(subjects, table.inputs, table.labels))


def canaries(tiny: t.Tiny, people: tuple[str, ...], file: Path) -> Path:
    """Write the rows of some people, as they asked to be deleted, to a table."""
    wanted = {*people, "Jörg  Müller"} if "jörg müller" in people else set(people)
    rows = [i for i, names in enumerate(tiny.table.subjects) if wanted & set(names)]
    t.reorder(tiny.table, rows).save(file, tiny.schema)
    return file


def in_plain(folder: Path, tiny: t.Tiny) -> list[str]:
    """Search the bytes of all files, sealed ones as they lie, for any record's input or subject."""
    secrets = [x.tobytes().lower() for x in tiny.table.inputs]
    secrets += [name.casefold().encode() for names in tiny.table.subjects for name in names]
    secrets += [b"j\\u00f6rg", "jörg".encode()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    return [path.name for path in files if any(secret in path.read_bytes().lower() for secret in secrets)]


def test_canaries_are_found_before_and_nowhere_after(named, tmp_path, capsys) -> None:
    """With receipts, a log of every command and the ledger's write-ahead log in the store."""
    home = tmp_path / "home"
    home.mkdir()
    store = named.fit(home / "store")
    assert not in_plain(home, named)
    file = canaries(named, GONE, tmp_path / "canaries.npz")
    with StoreFolder(store) as folder, Service(store) as service:
        before = scan(folder, file)
        assert all(name.startswith("records") for name in before["hits"])
        found = {label for hits in before["hits"].values() for label in hits}
        rows = sum(bool({*names} & {*GONE, "Jörg  Müller"}) for names in named.table.subjects)
        assert found == {f"row {i} {what}" for i in range(1, rows + 1) for what in ("input", "subject", "key")}
        service.predict(named.table.inputs[:3])
        for number, person in enumerate(GONE):
            if number % 2:
                service.delete([person], f"r{number}")
            else:
                assert main(["delete", str(store), person, "--request-id", f"r{number}"]) == 0
            main(["receipt", "show", str(store), f"r{number}", "--out", str(store / f"receipt {number}.json")])
        main(["status", str(store), "--json"])
        out, err = capsys.readouterr()
        (store / "log").write_text(out + err)
        assert (store / "ledger.sqlite-wal").exists()
        after = scan(folder, file)
        assert residue(folder) == {}
    assert (after["hits"], after["unopened"], after["not_searched"]) == ({}, [], [])
    assert after["canaries"] == 3 * rows
    assert not in_plain(home, named)
    with capsys.disabled():
        total = sum(sum(hits.values()) for hits in before["hits"].values())
        print(
            f"\ncanaries of {len(GONE)} people, {rows} records: {total} hits before, 0 after, in {after['files']} files"
        )


def test_the_search_finds_what_is_planted(mlp, tmp_path) -> None:
    """In every kind of file, in every spelling; a longer name is another one."""
    subjects = [("Jörg K",) if i == 0 else ("7",) if i == 1 else ("person 12",) for i in range(len(mlp.table))]
    mlp = replace(mlp, table=Table(subjects, mlp.table.inputs, mlp.table.labels))
    store = mlp.fit(tmp_path / "store", steps=1)
    t.reorder(mlp.table, [0, 1]).save(tmp_path / "canaries.npz", mlp.schema)
    (tmp_path / "canaries.txt").write_text("person 1\n\nperson 12\nabc\n")
    x, key = mlp.table.inputs[0].tobytes(), StoreKey.find(store)
    s3t_ext.delete(store, ["Jörg K", "7"])
    with StoreFolder(store) as folder:
        assert scan(folder, tmp_path / "canaries.npz")["hits"] == {}
        lines = scan(folder, tmp_path / "canaries.txt")
        assert {label for hits in lines["hits"].values() for label in hits} == {"line 3"}
        assert lines["not_searched"] == ["line 4"]
        node = next((store / "nodes").glob("*.sealed"))
        name = f"nodes/{node.stem}"
        planted = {
            store / "log": (b"-" * 3 + x + b"-", "row 1 input"),
            store / "metrics.json": (b'["7"]', "row 2 subject"),
            store / "escaped": (b"for j\\u00f6rg k.", "row 1 subject"),
            store / "ledger.sqlite-wal": ("of jörg k;".encode() * 2, "row 1 subject"),
            tmp_path / "store.anchor.new": (b"jo " + "jörg k".encode(), "row 1 subject"),
            tmp_path / ".store.abc.part" / "fresh" / "x": (b"1" + x, "row 1 input"),
            node: (seal(name, b"weights" + x, key), "row 1 input"),
            node.with_name(f".{node.name}.0123abcd.part"): (seal(name, b"w" + x, key), "row 1 input"),
            store / "records" / ".0-0.sealed.0123abcd.part": (seal("records/0-0", b'[["7"]]', key), "row 2 subject"),
        }
        for path, (data, label) in planted.items():
            was = path.read_bytes() if path.exists() else None
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            hits = scan(folder, tmp_path / "canaries.npz")["hits"]
            assert [(Path(name).name, list(found)) for name, found in hits.items()] == [(path.name, [label])], path
            path.write_bytes(was) if was is not None else path.unlink()
        for quiet in (b'"77"', b"77", b"jorg k", "xjörg k".encode(), "jörg kx".encode(), "jörg kö".encode(), x[1:]):
            (store / "log").write_bytes(quiet)
            assert scan(folder, tmp_path / "canaries.npz")["hits"] == {}, quiet
        (store / "log").unlink()
        (tmp_path / "canaries.txt").write_text("ab\n")
        with pytest.raises(ValueError, match="at least 6 bytes"):
            scan(folder, tmp_path / "canaries.txt")


def test_the_search_does_not_miss_a_copy_nor_what_no_key_opens(mlp, tmp_path, capsys) -> None:
    """Wherever the store lies: of a folder `base` above it nothing follows."""
    store = mlp.fit(tmp_path / "base" / "store", steps=1)
    canaries(mlp, ("person 3",), file := tmp_path / "canaries.npz")
    with StoreFolder(store) as folder:
        cell = next(c for c in folder.ledger.slices() if ["person 3"] in folder.records.get(*c).subjects)
        records = store / "records" / f"{cell[0]}-{cell[1]}.sealed"
        (store / "log").write_text('loss of "bob": 3')
        Table([("bob",)], mlp.table.inputs[:1] + 1, mlp.table.labels[:1]).save(tmp_path / "bob.npz", mlp.schema)
        assert scan(folder, tmp_path / "bob.npz")["hits"] == {"log": {"row 1 subject": 1}}, "a short name, in text only"
        (store / "log").write_text('loss of "person 3": 3')
        for copy in (store / "copy", records.with_name(f"{records.name}.bak"), store / "nodes" / "x.sealed"):
            shutil.copy(records, copy)
        report = scan(folder, file)
        found = {"log", "copy", f"records/{records.name}", f"records/{records.name}.bak", "nodes/x.sealed"}
        assert (report["hits"].keys(), report["unopened"]) == (found, [])
        shutil.copy(next((store / "nodes").glob("[0-9a-f]*.sealed")), node := store / "of-a-dead-node")
        node.write_bytes(seal("nodes/" + "0" * 64, b"weights", StoreKey.find(store)))
        (store / "of-another-store").write_bytes(seal("records/0-0", b"secret", StoreKey.new()))
        assert scan(folder, file)["unopened"] == ["of-a-dead-node", "of-another-store"]
    for name in ("log", "copy", "nodes/x.sealed", "of-a-dead-node", f"records/{records.name}.bak"):
        (store / name).unlink()
    s3t_ext.delete(store, ["person 3"])
    assert main(["erase", str(store), "--scan", str(file)]) == 1
    assert "found none" in (out := capsys.readouterr().out)
    assert "not looked into, so the search is incomplete: of-another-store: sealed, and opened by no key" in out
    (store / "of-another-store").unlink()
    assert main(["erase", str(store), "--scan", str(file)]) == 0


def test_the_search_takes_no_lock_of_the_books_away(mlp, store, tmp_path, monkeypatch) -> None:
    """Who closes a file drops the locks that its process holds on it: nothing of ours may have it open by then."""
    read, held = Path.read_bytes, []

    def looking(path):
        mine = {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
        held.extend(mine & {str(store / "ledger.sqlite"), str(store / "ledger.sqlite-shm")})
        return read(path)

    file = canaries(mlp, ("person 3",), tmp_path / "canaries.npz")
    with StoreFolder(store) as folder:
        folder.ledger.slices()
        monkeypatch.setattr(Path, "read_bytes", looking)
        assert scan(folder, file)["hits"]
        assert held == []
        folder.ledger.slices()


def test_the_command(mlp, store, tmp_path, capsys) -> None:
    file = canaries(mlp, ("person 3",), tmp_path / "canaries.npz")

    def call(*words: object) -> tuple[int, dict]:
        status = main(["erase", str(store), *map(str, words), "--json"])
        return status, json.loads(capsys.readouterr().out)

    assert call("--scan", file)[0] == 1
    with exclusive(store):
        s3t_ext.delete(store, ["person 3"], "r1")
        assert call()[1].items() >= {"erased": [], "pending": ["r1"], "erased_again": {}, "residue": {}}.items()
    assert main(["erase", str(store)]) == 0
    assert capsys.readouterr().out == "erased now: r1\n"
    status, report = call("--scan", file)
    assert (status, report["erased"], report["residue"], report["scan"]["hits"]) == (0, [], {}, {})
    (store / "log").write_text("person 3 was here")
    status = main(["erase", str(store), "--scan", str(file)])
    assert (status, "found 3 times in log: row 1 subject" in capsys.readouterr().out) == (1, True)
    assert main(["erase", str(store), "--scan", str(tmp_path / "nosuch")]) == 2


def test_what_an_old_copy_brings_back_is_told_and_erased_again(mlp, store, tmp_path, capsys) -> None:
    person = t.people_by_cell(mlp)[0, 1][0]
    shutil.copytree(store, tmp_path / "old")
    receipt = s3t_ext.delete(store, [person], "r1")
    dead = {f"nodes/{name}" for name in receipt["shards"][0]["dead"]}
    for folder in ("nodes", "records"):
        shutil.copytree(tmp_path / "old" / folder, store / folder, dirs_exist_ok=True)
    (store / "nodes" / f"{'0' * 64}.sealed").touch()
    with StoreFolder(store) as folder:
        left = residue(folder)
    assert left.keys() == {"r1", ""}
    assert set(left["r1"]) == dead | {"records/0-1"}
    assert left[""] == [f"nodes/{'0' * 64}"]
    mlp.table.save(tmp_path / "table.npz", mlp.schema)
    with pytest.raises(ValueError, match="certify: expected nothing to be left"):
        s3t_ext.verify(store, tmp_path / "table.npz", certify=True, progress=False)
    assert main(["erase", str(store), "--scan", str(canaries(mlp, (person,), tmp_path / "canaries.npz"))]) == 0
    assert "was there again of request r1: " in capsys.readouterr().out
    with StoreFolder(store) as folder:
        assert residue(folder) == {}
    assert s3t_ext.verify(store, tmp_path / "table.npz", certify=True, progress=False)["certified"] == ["r1"]


def test_a_rotation_beside_a_service_and_an_old_copy(mlp, store, tmp_path) -> None:
    """Running processes go on; a copy of the store from before is not opened by the new key."""
    old = StoreKey.find(store)
    shutil.copytree(store, tmp_path / "copy")
    with Service(store) as service:
        rotate(store)
        service.delete(["person 3"])
        assert len(service.predict(mlp.table.inputs[:2]).labels) == 2
    with StoreFolder(store) as folder:
        assert not folder.ledger.unerased()
        assert not any(
            names == ["person 3"] for cell in folder.ledger.slices() for names in folder.records.get(*cell).subjects
        )
    shutil.copy(tmp_path / "store.key", tmp_path / "copy.key")
    with pytest.raises(StoreError, match="of another store"), StoreFolder(tmp_path / "copy") as folder:
        folder.records.get(0, 0)
    with StoreFolder(tmp_path / "copy", old) as folder:
        assert len(folder.records.get(0, 0))


def test_verification_writes_nothing_in_plain(mlp, store, tmp_path, monkeypatch) -> None:
    seen: list[list[str]] = []
    learn = train.Trainer.train

    def looking(self, wanted, progress):
        trained = learn(self, wanted, progress)
        seen.append(in_plain(tmp_path / "home", mlp))
        return trained

    monkeypatch.setattr(train.Trainer, "train", looking)
    report = verify.compare(str(store), [mlp.table], "all", 0, False, str(tmp_path / "home" / "fresh"))
    assert (report["mismatched"], seen) == (0, [[]])
    assert not list((tmp_path / "home").glob("*.key"))


def test_training_leaves_no_copy_in_memory(mlp, tmp_path, monkeypatch) -> None:
    """Optimizer slots, records, trunk, ancestors and what was published are overwritten, of stale nodes too."""
    optimizers, batches, trunks, published, frozen = [], [], [], [], []
    keep = {
        "AdamW": lambda made: optimizers.append(made) or made,
        "Records": lambda made: batches.extend(part.tensor for part in made.inputs) or made,
        "Trunk": lambda made: trunks.append(made) or made,
        "_install": lambda made: frozen.extend(made[0].values()) or made,
    }

    def spy(name: str, function):
        return lambda *args, **kwargs: keep[name](function(*args, **kwargs))

    for owner, name in ((lockstep, "AdamW"), (train, "Records"), (train, "Trunk"), (lockstep.LockStep, "_install")):
        monkeypatch.setattr(owner, name, spy(name, getattr(owner, name)))
    publish = train.Trainer._publish
    store = tmp_path / "store"

    def overtaken(self, weights, ids):
        if not published:
            s3t_ext.delete(store, [t.people_by_cell(mlp)[0, 0][0]])
        published.extend(weights.values())
        return publish(self, weights, ids)

    monkeypatch.setattr(train.Trainer, "_publish", overtaken)
    mlp.fit(store, placement="layers")
    buffers = [b for o in optimizers for b in (o.flat, o.grad, o.m, o.v, o._tmp)]
    states = [part.tensor for trunk in trunks if trunk.form for part in trunk._kept]
    assert states
    buffers += states + batches + [tensor for pair in frozen for tensor in pair]
    assert len(optimizers) >= 3
    assert len(buffers) > 40
    assert all(buffer.isnan().all() for buffer in buffers)
    assert all(np.isnan(array).all() for tensors in published for array in tensors.values())
