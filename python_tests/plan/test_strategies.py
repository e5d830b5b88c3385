"""The strategies: their sequences, and the depth that they promise."""

import itertools
import math
import re
import subprocess
import sys
from collections import Counter

import pytest

from s3t_ext.plan import STRATEGIES, build, rotation, sisa, subsets

PERMUTED = [(slices, budget) for slices in range(1, 6) for budget in range(1, math.factorial(slices) + 1)]


def dirty_sets(slices):
    return [set(dirty) for size in range(slices + 1) for dirty in itertools.combinations(range(slices), size)]


def test_sisa_is_one_sequence():
    assert sisa(4).sequences == ((0, 1, 2, 3),)


@pytest.mark.parametrize(("slices", "budget"), PERMUTED)
def test_rotation_gives_whole_distinct_sequences_and_favours_no_head(slices, budget):
    sequences = rotation(slices, budget).sequences
    assert len(sequences) == budget
    assert all(sorted(sequence) == list(range(slices)) for sequence in sequences)
    heads = Counter(sequence[0] for sequence in sequences)
    assert len(heads) == min(budget, slices)
    assert max(heads.values()) - min(heads.values()) <= 1


def test_rotation_offsets():
    assert [sequence[0] for sequence in rotation(8, 4).sequences] == [0, 2, 4, 6]
    assert [sequence[0] for sequence in rotation(5, 3).sequences] == [0, 1, 3]
    assert rotation(3, 3).sequences == ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    assert set(rotation(4, 8).sequences) - set(rotation(4, 4).sequences) == {
        (0, 2, 3, 1), (1, 3, 0, 2), (2, 0, 1, 3), (3, 1, 2, 0)
    }  # fmt: skip


def test_rotation_with_all_slices_heads_is_a_latin_square():
    for position in zip(*rotation(5, 5).sequences):
        assert sorted(position) == list(range(5))


@pytest.mark.parametrize("slices", range(1, 9))
def test_subsets_keep_every_clean_slice(slices):
    tree = subsets(slices)
    for dirty in dirty_sets(slices):
        assert set(tree.best_live(dirty)) == set(range(slices)) - dirty


@pytest.mark.parametrize("slices", range(1, 11))
def test_subsets_cost_and_fewest_sequences(slices):
    tree = subsets(slices)
    assert tree.stages == 2**slices - 1
    assert tree.slice_passes == slices * 2 ** (slices - 1)
    assert len(tree.sequences) == math.comb(slices, slices // 2)
    assert tuple(range(slices)) in tree.sequences


def test_all_permutations_keep_what_subsets_keep():
    tree = rotation(4, 24)
    assert all(len(tree.best_live(dirty)) == 4 - len(dirty) for dirty in dirty_sets(4))


def test_build_by_name():
    assert set(STRATEGIES) == {"sisa", "rotation", "subsets"}
    assert build("sisa", 3) == sisa(3)
    assert build("subsets", 3) == subsets(3)
    assert build("rotation", 3) == rotation(3, 3)
    assert build("rotation", 3, 5) == rotation(3, 5)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("nosuch", 4), "strategy: wanted one of rotation, sisa, subsets, got 'nosuch'"),
        (("sisa", 0), "slices: wanted an integer of at least 1, got 0"),
        (("subsets", 2.0), "slices"),
        (("subsets", 17), "131071 stages for 17 slices"),
        (("subsets", 4, 6), "budget: subsets fixes its own sequences"),
        (("sisa", 4, 1), "budget: sisa fixes"),
        (("rotation", 4, 0), "budget: wanted 1..4! = 24 sequences, got 0"),
        (("rotation", 4, 25), "got 25"),
        (("rotation", 4, True), "got True"),
    ],
)
def test_bad_arguments_are_refused(arguments, wanted):
    with pytest.raises(ValueError, match=re.escape(wanted)):
        build(*arguments)


def test_import_loads_no_numerics():
    code = "import sys, s3t_ext.plan, s3t_ext.ledger; print(sorted({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded == "[]\n"
