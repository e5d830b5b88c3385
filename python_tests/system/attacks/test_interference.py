"""Non-interference over cases drawn from their numbers: see interference.py.

100 cases and 8 histories, or 2,000 and 400 with S3T_LONG=1; the counts are printed.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter

import interference
import interference_cases
import interference_histories

LONG = bool(os.environ.get("S3T_LONG"))
CASES = 2000 if LONG else 100
HISTORIES = 400 if LONG else 8


def test_what_is_left_does_not_depend_on_who_was_deleted(ram, capsys) -> None:
    wrong, nodes, compared = [], 0, 0
    for number in range(CASES):
        case = interference_cases.draw(number)
        outcome = interference.differences(case, ram / "case", ram / "bases")
        shutil.rmtree(ram / "case")
        nodes, compared = nodes + outcome.nodes, compared + (outcome.nodes > 0)
        if outcome.differences:
            wrong.append(f"{case}\n    {outcome.differences}")
    with capsys.disabled():
        print(f"\nnon-interference: {CASES} cases, {nodes} live nodes in {compared} of them, {len(wrong)} mismatches")
    assert not wrong, "\n".join(wrong)
    assert nodes > 3 * CASES, "too few nodes survived to compare much"


def test_what_is_left_of_a_history_does_not_depend_on_who_was_in_it(ram, capsys) -> None:
    """After healings, growths, re-admissions and kills too."""
    wrong, nodes, happened = [], 0, Counter[str]()
    for number in range(HISTORIES):
        outcome = interference_histories.differences(number, ram / "case", ram / "bases")
        shutil.rmtree(ram / "case")
        nodes += outcome.nodes
        happened.update(line.partition(" ")[0] for line in outcome.log)
        happened.update("killed" for line in outcome.log if " killed " in line)
        happened.update("readmitted" for line in outcome.log if line.startswith("grow, readmit ['"))
        if outcome.differences:
            wrong.append(f"history {number}: {outcome.log}\n    {outcome.differences}")
    with capsys.disabled():
        print(f"\nhistories: {HISTORIES}, {nodes} live nodes, {dict(happened)}, {len(wrong)} mismatches")
    assert not wrong, "\n".join(wrong)
    assert nodes > 3 * HISTORIES
    assert min(happened[kind] for kind in ("delete", "heal", "grow,", "readmitted", "killed")) > HISTORIES // 8


def test_every_kind_of_removal_leaves_something_to_compare() -> None:
    """The cases are what they are called: without this a kind could silently remove nobody."""
    for number in range(3 * len(interference_cases.REMOVED)):
        case = interference_cases.draw(number)
        assert str(case) == str(interference_cases.draw(number)), "a case is a function of its number"
        hit = [row for row in case.rows if case.hit(row)]
        if case.removed == "a co-subject":
            assert all("witness" in row.subjects[-1].lower() for row in hit)
            continue
        assert hit
        if case.removed == "the only member of a class":
            classes = {int(row.label) for row in hit} - {int(row.label) for row in case.rows if not case.hit(row)}
            assert len(interference_cases.CLASSES) - 1 in classes
        if case.removed == "the first row":
            assert case.hit(case.rows[0])
        if case.removed == "the last row":
            assert case.hit(case.rows[-1])
        if case.removed == "the one odd number type":
            assert {row.value.dtype.name for row in case.rows if not case.hit(row)} <= {"float32"}
            assert {row.value.dtype.name for row in hit} != {"float32"}
        if case.removed == "a whole slice":
            cells = {interference_cases.slice_of(row.subjects[0], case.config) for row in hit if len(row.subjects) == 1}
            rest = [row for row in case.rows if not case.hit(row)]
            assert not cells & {interference_cases.slice_of(row.subjects[0], case.config) for row in rest}
