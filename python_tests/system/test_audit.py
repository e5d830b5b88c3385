"""Audits: the control sees planted canaries, a sound store passes, and mutants of the pipeline do not."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import blobs
import numpy as np
import pytest
import tasks

import s3t_ext
from s3t_ext.cli import audit as command
from s3t_ext.cli.main import main
from s3t_ext.ledger.partition import place
from s3t_ext.store.files import StoreError, outside
from s3t_ext.system import audit
from s3t_ext.system.data.schema import Column, Schema
from s3t_ext.system.data.tables import Table
from s3t_ext.system.evaluate import probabilities
from s3t_ext.system.evidence import extent, isolation
from s3t_ext.system.evidence.canaries import asked_for, cast, join, take
from s3t_ext.system.evidence.oracle import FreshStores
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.serve import Refused, Service
from s3t_ext.system.training.lockstep import LockStep

SEED = 2
PEOPLE, STRANGERS = blobs.table(120, "person", SEED), blobs.table(90, "stranger", SEED)
DELETED = [f"person {i}" for i in range(120)]


def examine(store: Path, folder: Path, **changed) -> dict:
    """Audit in this process, where mutants live."""
    folder.mkdir()
    task = {"subjects": None, "sample": 30, "canaries": 30, "references": 2, "isolation": 1, "seed": SEED, **changed}
    tables = {"tables": [PEOPLE], "nonmembers": STRANGERS}
    return audit.examine(str(store), **{**tables, **task}, progress=False, scratch=str(folder))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A store from which the people of one slice are deleted."""
    path = blobs.store(tmp_path_factory.mktemp("audited"), PEOPLE, SEED)
    with StoreFolder(path) as folder:
        s3t_ext.delete(path, [name for name in DELETED if place(folder.key, name, 2, 3) == (1, 0)])
    return path


@pytest.fixture(scope="module")
def report(store, tmp_path_factory) -> dict:
    return examine(store, tmp_path_factory.mktemp("audit") / "scratch")


def test_canaries_are_seen_before_and_not_after(report) -> None:
    assert report["control"]["loss"] >= 0.70
    assert report["power"]
    assert report["differing"] == []
    assert report["same_after_reopening"]
    assert report["depths"] == {"before": [3, 3], "after": [2, 2]}
    for row in report["groups"]["canaries"]["attacks"].values():
        assert row["oracle"]["difference"] == 0, "the same answers, bit for bit"
        assert abs(row["retrained"]["difference"]) <= row["retrained"]["bound"]
        for gap in (row["oracle"], row["retrained"]):
            assert gap["bound"] == max(0.03, 3 * gap["difference_se"])
        assert abs(row["served"]["auc"] - 0.5) <= 3 * row["served"]["se"]
    assert report["groups"]["canaries"]["attacks"]["loss"]["before"]["auc"] == report["control"]["loss"]


def test_every_group_and_attack_is_told(report) -> None:
    groups = report["groups"]
    assert list(groups) == ["people", "canaries", "store"]
    assert all(list(group["attacks"]) == ["loss", "calibrated", "lira"] for group in groups.values())
    assert (groups["people"]["others"], groups["canaries"]["members"], groups["canaries"]["others"]) == (120, 30, 30)
    assert groups["store"]["members"] > 20
    assert "before" not in groups["store"]["attacks"]["loss"], "a deleted person is not trained on to see how it was"
    (row,) = report["isolation"]
    assert (row["change"], row["differing"], row["moved"], row["incomparable"]) == ("removed", [], True, 0)
    assert row["nodes"] > 4
    assert (report["left_out"], report["told"]) == ({}, [])
    json.dumps(report)


def test_candidates_are_scored_by_how_unsure_a_store_is_that_learnt_them(store, tmp_path, monkeypatch) -> None:
    rest, candidates = take(PEOPLE, range(9)), take(STRANGERS, range(4))
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6]])
    asked = []

    def trained(stores, name, table, seen, key):
        asked.append((table.subjects, seen.subjects, key == stores.folder.key))
        return p

    monkeypatch.setattr(audit, "_trained", trained)
    with StoreFolder(store) as folder:
        found = audit._memorised(FreshStores(folder, tmp_path, False), 0, rest, candidates)
    assert found.tolist() == [-p[i, y] for i, y in enumerate(candidates.labels)]
    assert asked == [(rest.subjects + candidates.subjects, candidates.subjects, False)]


def test_candidates_are_chosen_by_score_and_shared_out_by_chance(store) -> None:
    def score(rest, candidates):
        assert not set(rest.subjects) & set(candidates.subjects)
        return candidates.inputs[:, 0]

    with StoreFolder(store) as folder:
        part = cast(folder, PEOPLE, STRANGERS, None, 30, 20, 0, score)
        many = cast(folder, PEOPLE, STRANGERS, None, 30, 40, 0, score)
        held = cast(folder, PEOPLE, None, None, 15, 10, 0, score)
        few = cast(folder, PEOPLE, None, None, 15, 30, 0, score)
    chosen = np.r_[part.planted.inputs[:, 0], part.controls.inputs[:, 0]]
    others = part.others.inputs[:, 0]
    assert (part.candidates, len(chosen), len(others)) == (120, 40, 60)
    assert chosen.min() > np.sort(STRANGERS.inputs[:, 0])[-160:].min()
    assert np.sort(others)[-1] > chosen.min(), "the others are not what was left over"
    assert part.planted.inputs[:, 0].min() < part.controls.inputs[:, 0].max()
    assert part.controls.inputs[:, 0].min() < part.planted.inputs[:, 0].max()
    assert (many.candidates, len(many.others)) == (135, 45), "of 180"
    assert (held.candidates, few.candidates) == (60, 65), "180 are wanted: more than the table can spare"
    assert len(held.others) >= 15


@pytest.mark.parametrize(
    ("given", "meant"),
    [(40, (40, False)), ("7", (7, False)), ("memorised", (40, True)), ("memorised:9", (9, True)), (1, None)]
    + [(wrong, None) for wrong in ("memorized", "memorised:", "memorised:1", "memorised9", "-3", "")],
)
def test_how_canaries_are_asked_for(given, meant) -> None:
    if meant:
        assert asked_for(given) == meant
        return
    with pytest.raises(ValueError, match=f"canaries: expected at least 2, 'memorised' .*, got {given!r}"):
        asked_for(given)


@pytest.mark.parametrize("shift", [0.4, -0.4])
def test_an_auc_off_a_half_is_judged_where_the_oracles_is_another(report, shift) -> None:
    changed = copy.deepcopy(report)
    row = changed["groups"]["canaries"]["attacks"]["loss"]
    row["served"]["auc"] = 0.5 + shift
    line = f"canaries, loss: AUC after deletion is {0.5 + shift:.3f}, not 0.5"
    assert (audit._differing(changed), audit._told(changed)) == ([], [f"{line}, and so is the oracle's"])
    assert f"told, not judged: {line}" in command._text({**changed, "told": audit._told(changed)})
    row["oracle"]["difference"] = 1e-9
    assert (audit._differing(changed), audit._told(changed)) == ([line], [])


def test_a_store_of_two_generations_is_audited(tmp_path) -> None:
    """Who is re-admitted is no member by what was deleted; canaries and people are in shards of both tables."""
    store, more = blobs.store(tmp_path, PEOPLE, SEED), blobs.table(60, "newcomer", SEED)
    s3t_ext.delete(store, ["person 0"])
    back = Table(
        [("person 0",), *more.subjects], np.r_[PEOPLE.inputs[:1], more.inputs], np.r_[PEOPLE.labels[:1], more.labels]
    )
    config = {"grow": True, "grow_shards": 1, "readmit": ["person 0"], "progress": False}
    s3t_ext.fit(store, back, blobs.SCHEMA, tmp_path / "base", blobs.CONFIG, **config)
    s3t_ext.delete(store, ["person 1", "newcomer 1"])
    found = examine(store, tmp_path / "scratch", tables=[PEOPLE, back], references=0, isolation=1)
    assert found["power"]
    assert found["differing"] == []
    assert found["depths"] == {"before": [3, 3, 3], "after": [2, 2, 2]}
    assert found["groups"]["store"]["members"] == 4
    assert all(row["nodes"] > 8 for row in found["isolation"])
    assert found["groups"]["people"]["attacks"]["loss"]["oracle"]["difference"] == 0
    for tables in (PEOPLE, [back]):
        with pytest.raises(
            ValueError, match="table: expected one for each of the store's 2 generations, in order, got 1"
        ):
            s3t_ext.audit(store, tables)


@pytest.mark.parametrize(("task", "references"), [("regression", 2), ("causal", 0)])
def test_stores_without_classes_are_audited(tmp_path, task, references) -> None:
    base, schema, people, strangers = tasks.make(tmp_path, task)
    s3t_ext.fit(tmp_path / "store", people, schema, base, tasks.CONFIG[task], key=bytes(32), progress=False)
    changed = {"tables": [people], "nonmembers": strangers, "references": references, "isolation": 2}
    found = examine(tmp_path / "store", tmp_path / "scratch", **changed)
    assert found["power"]
    assert found["differing"] == []
    assert [row["change"] for row in found["isolation"]] == ["removed", "changed"]
    for row in found["groups"]["canaries"]["attacks"].values():
        assert row["oracle"]["difference"] == 0
        assert row["served"]["auc"] < row["before"]["auc"] - 0.2


def test_a_regression_that_forgets_nothing_is_found_out(tmp_path, monkeypatch) -> None:
    """Mutant: the service goes on with dead nodes."""
    base, schema, people, strangers = tasks.make(tmp_path, "regression")
    s3t_ext.fit(tmp_path / "store", people, schema, base, tasks.CONFIG["regression"], key=bytes(32), progress=False)
    for name in ("_mask", "_leave", "_wake"):
        monkeypatch.setattr(Service, name, lambda self, *dirty: None)
    changed = {"tables": [people], "nonmembers": strangers, "references": 0, "isolation": 0}
    found = examine(tmp_path / "store", tmp_path / "scratch", **changed)
    assert any(line.startswith("canaries, loss: AUC differs from the oracle's by +") for line in found["differing"])


def test_why_the_stores_own_deletions_are_not_attacked(store, monkeypatch) -> None:
    x = take(PEOPLE, [0, 1])
    assert audit._served(store, None, 9, x) == (None, "no nonmembers were given")
    few = "at least 2 records of deleted subjects are needed in the table, it has 1"
    assert audit._served(store, STRANGERS, 1, x) == (None, few)
    served, why = audit._served(store, STRANGERS, 2, x)
    assert (served.shape, why) == ((2, 3), "")

    def refuse(*_):
        raise Refused("every shard is dead")

    monkeypatch.setattr(Service, "predict", refuse)
    assert audit._served(store, STRANGERS, 2, x) == (None, "the store does not serve: every shard is dead")


def test_a_deletion_that_does_not_mask_is_found_out(store, tmp_path, monkeypatch) -> None:
    """Mutant: the service goes on with dead nodes."""
    for name in ("_mask", "_leave", "_wake"):
        monkeypatch.setattr(Service, name, lambda self, *dirty: None)
    found = examine(store, tmp_path / "scratch", isolation=0)
    assert found["depths"] == {"before": [3, 3], "after": [3, 3]}
    assert "rehearsal: the store, opened again, answers otherwise" in found["differing"]
    assert any(line.startswith("canaries, loss: AUC differs from the oracle's by +") for line in found["differing"])
    assert f"canaries, loss: AUC after deletion is {found['control']['loss']:.3f}, not 0.5" in found["differing"]


def test_a_store_that_forgets_nothing_is_found_out(store, tmp_path, monkeypatch) -> None:
    """Mutant: dead nodes stay live for every reader and are not erased; the attack alone can tell."""
    first: dict[Path, dict] = {}
    honest = Service._live
    monkeypatch.setattr(Service, "_live", lambda self: dict(first.setdefault(self.folder.path, honest(self))))
    for name in ("_mask", "_leave"):
        monkeypatch.setattr(Service, name, lambda self, dirty: None)
    monkeypatch.setattr("s3t_ext.system.serve.erase_or_warn", lambda folder: None)
    found = examine(store, tmp_path / "scratch", isolation=0)
    assert found["same_after_reopening"]
    assert any(line.startswith("canaries, loss: AUC differs from the oracle's by +") for line in found["differing"])


def test_a_pipeline_that_counts_all_records_is_found_out(tmp_path, monkeypatch) -> None:
    """Mutant: batches start at the number of records in the whole store; a removed slice then moves every node."""
    stage = LockStep.stage

    def counting(self, nodes, ids, held, tell):
        shift = sum(len(self.folder.records.get(s, k)) for s in range(2) for k in range(3))
        moved = {node: np.roll(order, shift) for node, order in held.orders.items()}
        return stage(self, nodes, ids, held._replace(orders=moved), tell)

    monkeypatch.setattr(LockStep, "stage", counting)
    store = blobs.store(tmp_path, PEOPLE, SEED)
    found = examine(store, tmp_path / "scratch", references=0)
    (row,) = found["isolation"]
    assert row["moved"]
    assert len(row["differing"]) == row["nodes"] == 10
    assert [line for line in found["differing"] if line.startswith("isolation")]


def test_without_power_nothing_follows(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(blobs, "CONFIG", blobs.Config(shards=2, slices=3, steps=1, batch=8, rank=8))
    found = examine(blobs.store(tmp_path, PEOPLE, SEED), tmp_path / "scratch", references=0, isolation=0)
    assert not found["power"]
    assert "nothing follows" in command._text(found)


def test_an_isolation_that_changes_nothing_has_no_power(store, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(isolation, "_without", lambda records, rows: records)
    found = examine(store, tmp_path / "scratch", references=0)
    assert found["control"]["loss"] >= 0.70
    assert (found["isolation"][0]["moved"], found["power"], found["differing"]) == (False, False, [])


def test_nobody_deleted_is_trained_on_and_the_oracle_never_saw_a_member(store, tmp_path, monkeypatch) -> None:
    tables: dict[str, set] = {}

    make = FreshStores.make

    def spy(self, name, table, key=None):
        tables[name] = {names[0] for names in table.subjects}
        return make(self, name, table, key)

    monkeypatch.setattr(FreshStores, "make", spy)
    examine(store, tmp_path / "scratch", isolation=2)
    with StoreFolder(store) as folder:
        gone = {name for name in DELETED if folder.hashed(name) in folder.ledger.deleted()}
    assert gone
    assert len(tables) == 9
    assert not [name for name, people in tables.items() if gone & people]
    assert tables["oracle-of-rehearsal"] == tables["retrained-rehearsal"]
    assert tables["oracle-of-store"] == tables["retrained-store"]
    asked = tables["rehearsal"] - tables["oracle-of-rehearsal"]
    assert sum(name.startswith("person") for name in asked) == 30
    assert sum(name.startswith("audit canary") for name in asked) == 30
    assert not [name for name in tables["oracle-of-rehearsal"] if not name.startswith("person")]
    assert asked & tables["oracle-of-store"] == {name for name in asked if name.startswith("person")}
    halves = [{n for n in tables[f"reference-{k}"] if not n.startswith("person")} for k in (0, 1)]
    assert not halves[0] & halves[1]
    assert sum(map(len, halves)) >= 55, "canaries and controls; two controls may be of one stranger"
    assert not asked & tables["reference-0"] & set(DELETED)


def test_roles_are_disjoint_drawn_by_seed_and_leave_something_to_serve(store) -> None:
    with StoreFolder(store) as folder:
        parts = [
            cast(folder, PEOPLE, strangers, None, 30, 20, seed) for strangers in (None, STRANGERS) for seed in (0, 0, 1)
        ]
        for part in parts:
            rows = [x.tobytes() for x in join(part.people, part.rest, part.others, part.planted, part.controls).inputs]
            assert len(set(rows)) == len(rows)
            assert 20 <= len(part.asked) <= 30
            assert {names[0] for names in part.people.subjects} == set(part.asked)
            homes = [place(folder.key, names[0], 2, 3) for names in part.planted.subjects]
            assert {homes.count(cell) for cell in set(homes)} == {10}, "spread evenly"
            assert {place(folder.key, name, 2, 3) for name in part.asked} == set(homes)
            assert sorted(shard for shard, _ in set(homes)) == [0, 1]
            assert len(set(part.planted.subjects)) == 20
        truth = {x.tobytes(): y for table in (PEOPLE, STRANGERS) for x, y in zip(table.inputs, table.labels)}
        for part in parts:
            wrong = join(part.planted, part.controls)
            assert not [y for x, y in zip(wrong.inputs, wrong.labels) if truth[x.tobytes()] == y]
            right = join(part.people, part.others, part.rest)
            assert not [y for x, y in zip(right.inputs, right.labels) if truth[x.tobytes()] != y]
        assert parts[0].asked == parts[1].asked != parts[2].asked
        assert not {n for (n,) in parts[0].others.subjects} & {
            n for (n,) in join(parts[0].rest, parts[0].people).subjects
        }


def test_named_people_are_deleted_in_their_own_slices(store) -> None:
    with StoreFolder(store) as folder:
        part = cast(folder, PEOPLE, STRANGERS, ["PERSON 5", "person 9"], 30, 20, 0)
        assert part.asked == ["person 5", "person 9"]
        assert len(part.people) == 4
        homes = {place(folder.key, names[0], 2, 3) for names in part.planted.subjects}
        assert homes == {place(folder.key, name, 2, 3) for name in part.asked}
        named = [f"person {i}" for i in range(40)]
        assert len(cast(folder, PEOPLE, None, named, 1, 10, 0).people) == 80, "nobody of them is held out"
        for people, got in ((["person 5", "nobody"], "1 of 2 who are not, number 2 for one"), ([], "none")):
            with pytest.raises(ValueError, match=f"expected people of the table, not deleted yet, got {got}$"):
                cast(folder, PEOPLE, STRANGERS, people, 30, 20, 0)


def test_too_few_records_are_refused(store) -> None:
    with StoreFolder(store) as folder:
        with pytest.raises(ValueError, match=r"nonmembers: expected at least 202 records .* got 180"):
            cast(folder, PEOPLE, STRANGERS, None, 30, 100, 0)
        with pytest.raises(ValueError, match=r"table: expected at least .* are held out, got 240"):
            cast(folder, PEOPLE, None, None, 60, 40, 0)


@pytest.mark.parametrize("wrong", [{"sample": 0}, {"canaries": 1}, {"isolation": -1}, {"references": 3}])
def test_bad_numbers_are_refused(store, wrong) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected .*at least"):
        s3t_ext.audit(store, PEOPLE, **wrong)


def test_a_member_is_no_nonmember(store, tmp_path) -> None:
    known = join(take(STRANGERS, range(90)), take(PEOPLE, [0]))
    with pytest.raises(ValueError, match=r"nonmembers: expected people .* got one whom it did in row 91$"):
        examine(store, tmp_path / "scratch", nonmembers=known)


@pytest.mark.parametrize("combine", ["logits", "vote", "probabilities"])
def test_answers_become_probabilities(store, combine) -> None:
    with Service(store, combine=combine) as service:
        p = probabilities(service, join(PEOPLE, PEOPLE, PEOPLE))  # (720, 3): more than one forward pass
        said = [blobs.SCHEMA.classes[i] for i in p.argmax(1)]
        assert said[:240] == service.predict(PEOPLE.inputs).labels
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-6)
    assert p.shape == (720, 3)
    assert p.min() >= 0


def test_great_logits_do_not_overflow() -> None:
    said = SimpleNamespace(scores=np.array([[1000, 999, -1000]], np.float32), nodes=())
    folder = SimpleNamespace(schema=blobs.SCHEMA)
    p = probabilities(SimpleNamespace(combine="logits", predict=lambda _: said, folder=folder), take(PEOPLE, [0]))
    np.testing.assert_allclose(p, [[1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0]])


def test_errors_of_a_regression_count_in_the_units_in_which_it_learns() -> None:
    schema = Schema(task="regression", shape=(1,), targets=(Column("u", 5.0, 0.5), Column("v", 0.0, 2.0)))
    said = SimpleNamespace(scores=np.array([[9.0, 1.0]]), nodes=())
    service = SimpleNamespace(predict=lambda _: said, folder=SimpleNamespace(schema=schema))
    table = Table([("a",)], np.zeros((1, 1), np.float32), np.array([[1.0, 1.0]], np.float32))  # 7 and 0.5
    p = np.exp(-(1 + 1) / 4)
    np.testing.assert_allclose(probabilities(service, table), [[p, 1 - p]], rtol=1e-12)


def test_the_command_in_a_fresh_process(store, tmp_path, capsys, monkeypatch) -> None:
    """People are held out; canaries are the most memorised; the store is as it was, and nothing is left beside it."""
    kept = [outside(store, kind) for kind in ("anchor", "key")]
    (tmp_path / "keys").mkdir()
    for file in kept:
        shutil.copy(file, tmp_path / "keys")
    monkeypatch.setenv("S3T_KEY_FOLDER", str(tmp_path / "keys"))
    PEOPLE.save(tmp_path / "table.npz", blobs.SCHEMA)
    before = _digest(store)
    words = [
        "--sample",
        "15",
        "--canaries",
        "memorised:15",
        "--references",
        "0",
        "--isolation",
        "1",
        "--seed",
        "2",
        "--json",
    ]
    status = main(["audit", str(store), str(tmp_path / "table.npz"), *words])
    found = json.loads(capsys.readouterr().out)
    assert status == 0, found
    assert list(found["groups"]) == ["people", "canaries"]
    assert found["left_out"] == {"store": "no nonmembers were given"}
    assert "store: left out: no nonmembers were given" in command._text(found)
    assert "nothing differs" in command._text(found)
    assert (found["candidates"], found["groups"]["canaries"]["members"]) == (49, 15), "of 64 that were held out"
    assert "the most memorised of 49 candidates" in command._text(found)
    assert _digest(store) == before
    assert not [p.name for p in store.parent.iterdir() if p.name.endswith(".part")]
    assert sorted(p.name for p in (tmp_path / "keys").iterdir()) == [file.name for file in kept]
    (tmp_path / "who.txt").write_text("nobody\n")
    assert main(["audit", str(store), str(tmp_path / "table.npz"), "--subjects", str(tmp_path / "who.txt")]) == 2
    assert "not deleted yet, got 1 of 1 who are not" in capsys.readouterr().err


@pytest.mark.parametrize(("power", "differing", "status"), [(True, [], 0), (False, [], 2), (False, ["x"], 1)])
def test_exit_status(report, monkeypatch, capsys, power, differing, status) -> None:
    told = {**report, "power": power, "differing": differing}
    monkeypatch.setattr(command, "opened", lambda *_: None)
    monkeypatch.setattr("s3t_ext.system.audit.audit", lambda *_, **__: told)
    assert main(["audit", "store", "table"]) == status
    said = capsys.readouterr().out
    assert ("nothing follows" in said) == (not power)
    assert "isolation: shard" in said


def test_a_store_that_is_not_there(tmp_path) -> None:
    with pytest.raises(StoreError, match="holds no store"):
        s3t_ext.audit(tmp_path / "none", PEOPLE)


def _digest(store: Path) -> dict[str, str]:
    files = [p for p in store.rglob("*") if p.is_file() and not p.name.endswith(("-wal", "-shm"))]
    return {str(p.relative_to(store)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.usefixtures("report")
def test_what_an_audit_takes_is_told_and_refused(store, tmp_path_factory, monkeypatch) -> None:
    """In the parent, before anything is read; as many scratch stores as the audit above made."""
    scratch = next(iter(tmp_path_factory.getbasetemp().glob("audit[0-9]*/scratch")))
    begun: list[str] = []
    monkeypatch.setattr(audit, "in_fresh_process", lambda _, task, __: begun.append(task["size"]) or {})

    def ask() -> None:
        audit.audit(store, PEOPLE, nonmembers=STRANGERS, references=2, isolation=1)

    ask()
    assert f"{len(list(scratch.iterdir()))} scratch stores of that size, about " in begun[0]
    size = sum(path.stat().st_size for path in (store / "records").iterdir())
    full = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=7 * size))
    for name, value, says in (
        ("free_bytes", lambda: 6 * size, "of memory for its tables"),
        ("shutil", full, "of disk beside the store"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(extent, name, value)
            with pytest.raises(ValueError, match=rf"audit: expected .* {says}, got .* use fewer references"):
                ask()
    assert len(begun) == 1
