"""The stage tree: what is refused, and what is served when slices are dirty."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3t_ext.plan import StageTree


@st.composite
def trees(draw):
    slices = draw(st.integers(1, 6))
    sequence = st.permutations(range(slices)).flatmap(lambda order: st.integers(1, slices).map(lambda n: order[:n]))
    return StageTree.from_sequences(slices, draw(st.lists(sequence, min_size=1, max_size=8)))


@given(trees())
def test_tree_is_closed_and_its_leaves_say_everything(tree):
    assert all(path[:-1] in ((), *tree.nodes) for path in tree.nodes)
    assert StageTree.from_sequences(tree.slices, tree.sequences) == tree
    assert StageTree.from_json(tree.to_json()) == tree
    assert tree.stages == len(tree.nodes) >= len(tree.sequences)
    assert tree.depth == max(map(len, tree.nodes))
    assert all(tree.parent(path) == path[:-1] for path in tree.nodes)


@given(trees(), st.data())
def test_best_live_is_a_function_of_the_dirty_set(tree, data):
    dirty = data.draw(st.lists(st.integers(0, tree.slices - 1)))
    best = tree.best_live(dirty)
    assert best == tree.best_live(data.draw(st.permutations(dirty + dirty)))
    live = [path for path in tree.nodes if not set(path) & set(dirty)]
    assert list(tree.live(dirty)) == live
    assert best == (sorted(live, key=lambda path: (-len(path), path))[0] if live else ())


@given(trees(), st.data())
def test_best_live_only_shrinks(tree, data):
    dirty = data.draw(st.sets(st.integers(0, tree.slices - 1)))
    more = dirty | data.draw(st.sets(st.integers(0, tree.slices - 1)))
    assert len(tree.best_live(more)) <= len(tree.best_live(dirty))


def test_ties_go_to_the_smallest_path():
    tree = StageTree.from_sequences(3, [(2, 1), (0, 2), (1, 0)])
    assert tree.best_live([]) == (0, 2)
    assert tree.best_live([0]) == (2, 1)
    assert tree.best_live([0, 1, 2]) == ()


def test_costs():
    tree = StageTree.from_sequences(4, itertools.permutations(range(4), 2))
    assert (tree.stages, tree.slice_passes, tree.layer_passes) == (16, 4 + 12 * 2, (4 + 12 * 4) / 4)


@pytest.mark.parametrize(
    ("slices", "nodes", "wanted"),
    [
        (0, ((0,),), "slices: wanted an integer of at least 1, got 0"),
        (True, ((0,),), "slices"),
        (2, (), "at least one stage"),
        (2, ((0,), (0,)), "distinct"),
        (2, ((), (0,)), "distinct, non-empty"),
        (2, ((0,), (0, 0)), r"the path \(0, 0\)"),
        (2, ((0,), (2,)), r"slices in 0\.\.1"),
        (2, ((0,), (1, 0)), r"the parent of \(1, 0\) is missing"),
        (2, ((1,), (0,)), "sorted"),
    ],
)
def test_malformed_tree_is_refused(slices, nodes, wanted):
    with pytest.raises(ValueError, match=wanted):
        StageTree(slices, nodes)


def test_bad_arguments_are_refused():
    tree = StageTree.from_sequences(2, [(0, 1)])
    with pytest.raises(ValueError, match=r"dirty: wanted slices in 0\.\.1, got \[2\]"):
        tree.best_live({2})
    with pytest.raises(ValueError, match="path"):
        tree.parent((1,))
    for data in ({}, {"slices": 2, "sequences": 3}, {"slices": "2", "sequences": [[0]]}):
        with pytest.raises(ValueError, match="wanted"):
            StageTree.from_json(data)
