"""Every mutant is caught, and by what; the pipeline as it is is caught by nothing. Tables are printed.

The check that mutants.py names runs first: non-interference, or an ordinary test of this folder. The others run only
where it has not caught the mutant; S3T_LONG=1 runs all of them on all.
"""

from __future__ import annotations

import inspect
import os
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import interference
import interference_cases
import mutants
import pytest
import test_deletion
import test_ensemble
import test_erasure
import test_exactness
import test_executor
import test_export
import test_generate
import test_growth
import test_heal
import test_healing_served
import test_lockstep
import test_report
import test_residency
import test_rules
import test_serving
import test_tables
import test_training_and_deletion
import test_verify
import tiny as t
import untrained

LONG = bool(os.environ.get("S3T_LONG"))
CASES = (1, 0, 13, 3, 11)  # of interference_cases.draw: together they show every mutant that the first twenty show
MODULES = (
    *(test_rules, test_deletion, test_serving, test_exactness, test_training_and_deletion, test_tables),
    *(test_ensemble, test_residency, test_generate, test_export, test_heal, test_healing_served),
    *(test_growth, test_report),
)
GIVEN = {"mlp", "tiny", "store", "own", "raw", "tmp_path", "monkeypatch"}
APART = {  # starting processes, which no patch reaches, or breaking the product themselves
    "test_a_second_process_sees_the_deletion",
    "test_without_the_release_check_a_stale_answer_gets_out",
}
BROKEN = AttributeError, ImportError, NameError, TypeError  # the mutant or the check itself, so they catch nothing
FROM_OTHERS = (  # of modules whose other tests start processes
    test_executor.test_a_worker_does_not_open_the_ledger,
    test_erasure.test_training_leaves_no_copy_in_memory,
    test_verify.test_nothing_is_certified_on_a_difference_or_before_erasure,
    test_verify.test_a_deletion_meanwhile_is_no_difference,
    test_lockstep.test_a_longer_text_moves_no_other_node,
    test_lockstep.test_states_and_records_of_the_deleted_are_overwritten_between_passes,
)


def _checks() -> dict[str, Callable[..., None]]:
    """List the ordinary tests that can be run here; a parametrized one has the first of its values."""
    tests = {name: test for m in MODULES for name, test in vars(m).items() if name.startswith("test_")}
    tests |= {test.__name__: test for test in FROM_OTHERS}
    checks = {}
    for name in tests.keys() - APART:
        marks = [m.args for m in getattr(tests[name], "pytestmark", []) if m.name == "parametrize"]
        first = {}
        for argument, values in marks:
            value = next(iter(values))
            first |= {argument: value} if isinstance(argument, str) else dict(zip(argument, value, strict=True))
        if set(inspect.signature(tests[name]).parameters) <= GIVEN | first.keys():
            checks[name] = partial(tests[name], **first)
    return dict(sorted(checks.items()))


CHECKS = _checks()


class Suite:
    """The checks, run in one folder; each gets a store of its own, trained by the pipeline as it is patched then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mlp, self.vit = t.make(folder / "mlp"), t.make(folder / "vit", "vit")
        self.cases = [interference_cases.draw(number) for number in CASES]

    def non_interference(self) -> str | None:
        """Name the first case that differs, or what the product says where it refuses to go on."""
        for case in self.cases:
            try:
                if interference.differences(case, self.folder / "case", self.folder / "bases").differences:
                    return mutants.NI
            except BROKEN:
                raise
            except Exception as error:
                return f"{type(error).__name__} in training or serving"
            finally:
                shutil.rmtree(self.folder / "case", ignore_errors=True)
        return None

    def fails(self, name: str) -> bool:
        """Run a test of this folder as pytest would, and tell whether it fails."""
        own = self.folder / "own"
        own.mkdir()
        parameters = inspect.signature(CHECKS[name]).parameters
        wanted = [argument for argument in parameters if argument not in CHECKS[name].keywords]
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                give = {"mlp": self.mlp, "tiny": self.vit, "tmp_path": own, "monkeypatch": patch}
                if "raw" in wanted:
                    give["raw"] = own / "table.npz"
                    self.mlp.table.save(give["raw"], self.mlp.schema)
                if "store" in wanted:
                    give["store"] = self.mlp.fit(own / "store")
                if "own" in wanted:
                    give["own"] = untrained.store(own / "store", "llama", "causal", placement="layers")
                CHECKS[name](**{argument: give[argument] for argument in wanted})
            except BROKEN:
                raise
            except (Exception, pytest.fail.Exception):
                return True
            finally:
                shutil.rmtree(own)
        return False

    def catches(self, mutant: mutants.Mutant) -> list[str]:
        """List what catches a mutant."""
        with pytest.MonkeyPatch.context() as patch:
            mutant.apply(patch)
            caught: list[str] = []
            for name in sorted([mutants.NI, *CHECKS], key=lambda name: not name.startswith(mutant.catches)):
                if caught and not LONG:
                    break
                found = self.non_interference() if name == mutants.NI else name * self.fails(name)
                caught += [found] if found else []
        return caught


@pytest.mark.parametrize("rule", range(1, 16))
def test_every_mutant_of_a_rule_is_caught(rule, ram, capsys) -> None:
    suite = Suite(ram)
    table = [(mutant, suite.catches(mutant)) for mutant in mutants.MUTANTS if mutant.rule == rule]
    with capsys.disabled():
        print()
        for mutant, caught in table:
            print(f"{mutant.rule:4} {mutant.name:40} {', '.join(caught) or 'NOTHING'}")
    assert table, "a rule without a mutant"
    assert not [mutant.name for mutant, caught in table if not caught]
    unnamed = [m.name for m, caught in table if not any(name.startswith(m.catches) for name in caught)]
    assert not unnamed, "caught, but not by the check that mutants.py names"


def test_every_mutant_belongs_to_a_rule() -> None:
    """Those that no check but non-interference needs to catch show that it can see."""
    assert {mutant.rule for mutant in mutants.MUTANTS} == set(range(1, 16))
    assert sum(mutant.catches == mutants.NI for mutant in mutants.MUTANTS) >= 10


def test_nothing_catches_the_pipeline_as_it_is(ram) -> None:
    """Run here as on a mutant: what would fail for want of a fixture, say, catches nothing."""
    suite = Suite(ram)
    assert len(CHECKS) > 40
    assert suite.non_interference() is None
    named = [name for name in CHECKS if any(name.startswith(mutant.catches) for mutant in mutants.MUTANTS)]
    assert not [name for name in (CHECKS if LONG else named) if suite.fails(name)]
