"""Old snapshots put back in every way, and backup and restore killed at random instants; the counts are printed.

S3T_LONG=1: 1,000 snapshots, 1,000 kills of each, in nine minutes.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from histories import History
from test_kills import run

from s3t_ext.ledger import LedgerError
from s3t_ext.ledger.anchor import Anchor
from s3t_ext.store.files import StoreError, outside
from s3t_ext.system.restore import restore

LONG = bool(os.environ.get("S3T_LONG"))


def test_a_kill_leaves_no_half_backup_and_no_half_restored_store_that_serves_the_dead(ram) -> None:
    kills = 1000 if LONG else 40
    seen = run("kills_restore.py", ram, kills, 8)
    print(f"kill -9: {seen}")
    assert [counts["kills"] for counts in seen.values()] == [kills, kills]
    assert min(seen["backup"]["not there"], seen["restore"]["served"], seen["restore"]["no store yet"]) > 0


def test_old_snapshots_never_serve_a_dead_node(template, ram, capsys) -> None:
    seen: Counter[str] = Counter()
    case = 0
    while sum(seen.values()) < (1000 if LONG else 100):
        aside = ram / "aside"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        past = Past(random.Random(case), History(template.copy(ram / "at"), aside))
        while past.go_on(seen) == "restored" and past.chance.random() < 0.5:
            pass  # the next disaster, with copies from before and after this one
        case += 1
    with capsys.disabled():
        print(f"\nold snapshots: {sum(seen.values())} put back, {dict(sorted(seen.items()))}; 0 dead nodes served")
    assert min(seen[kind] for kind in ("copy refused", "restored", "restore refused")) > 0, seen


class Past:
    """A store's past: its copies, each with the number of requests that it knows."""

    def __init__(self, chance: random.Random, history: History) -> None:
        self.chance, self.history = chance, history
        self.snapshots: list[tuple[int, Path]] = []
        self.backups, self.ledgers = [(0, history.backup("0"))], [(0, history.ledger("0.sqlite"))]

    def go_on(self, seen: Counter[str]) -> str:
        """Delete at random, put an old state back in some way, and hold what then serves against what was asked."""
        chance, history = self.chance, self.history
        for _ in range(chance.randrange(1, 5)):
            people = chance.sample([*history.people, "nobody"], chance.randrange(1, 3))
            history.delete(*people, erase=chance.random() < 0.7)
            step = len(history.receipts)
            if chance.random() < 0.5:
                self.snapshots.append((step, history.snapshot(f"snapshot {step}")))
            if chance.random() < 0.5:
                self.backups.append((step, history.backup(f"backup {step}")))
            self.ledgers.append((step, history.ledger(f"{step}.sqlite")))
        outcome = self.disaster(len(history.receipts))
        seen[outcome] += 1
        return outcome

    def disaster(self, asked: int) -> str:
        chance, history = self.chance, self.history
        known = 0
        history.lose()
        if self.snapshots and chance.random() < 0.7:
            known, old = chance.choice(self.snapshots)
            shutil.copytree(old, history.world.path)
            if chance.random() < 0.4:
                if Anchor(history.world.path / "anchor").read() == Anchor(outside(history.world.path, "anchor")).read():
                    history.world.settle()
                    return "copy is the newest"
                with pytest.raises(LedgerError, match="s3t restore"):
                    history.world.check()
                return "copy refused"
        step, made = chance.choice(self.backups)
        ledger = chance.choice(self.ledgers) if chance.random() < 0.5 else (0, None)
        known = max(known, step, ledger[0])
        given = {n for n in range(asked) if chance.random() < 0.8}
        receipts = [history.written / f"r{n}.json" for n in given]
        if set(range(known, asked)) <= given:
            restore(made, history.world.path, ledger[1], receipts)
            history.world.settle()
            return "restored"
        with pytest.raises(StoreError, match="acknowledged requests are missing"):
            restore(made, history.world.path, ledger[1], receipts)
        with pytest.raises((LedgerError, StoreError), match=r"s3t restore|holds no store"):
            history.world.check()
        return "restore refused"
