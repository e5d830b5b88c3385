"""The stage tree: what is refused, and what is served when slices are dirty."""

import itertools
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

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
def test_nodes_are_the_prefixes_and_leaves_the_rest(tree):
    prefixes = {path[:depth] for path in tree.sequences for depth in range(1, len(path) + 1)}
    assert tree.nodes == tuple(sorted(prefixes, key=lambda path: (len(path), path)))
    assert set(tree.sequences) == prefixes - {path[:-1] for path in prefixes}
    assert StageTree.from_sequences(tree.slices, [*tree.nodes, (), *tree.nodes]) == tree


@given(trees())
def test_tree_is_closed_and_its_leaves_say_everything(tree):
    assert all(path[:-1] in ((), *tree.nodes) for path in tree.nodes)
    assert StageTree.from_sequences(tree.slices, tree.sequences) == tree
    assert StageTree.from_json(tree.to_json()) == tree
    assert tree.stages == len(tree.nodes) >= len(tree.sequences)
    assert tree.slice_passes == sum(map(len, tree.nodes))
    assert tree.layer_passes == sum(len(path) ** 2 for path in tree.nodes) / tree.slices
    assert tree.depth == max(map(len, tree.nodes))
    assert tree.heads == tuple(sorted(path[0] for path in tree.nodes if len(path) == 1))
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
    ("slices", "sequences", "wanted"),
    [
        (0, ((0,),), "slices: wanted an integer of at least 1, got 0"),
        (True, ((0,),), "slices"),
        (2, (), "at least one, got none"),
        (2, ((0,), (0,)), r"wanted leaves, got \(0,\), with which \(0,\) begins"),
        (3, ((0,), (1, 2), (0, 1, 2)), r"wanted leaves, got \(0,\), with which \(0, 1, 2\) begins"),
        (2, ((),), r"the path \(\)"),
        (2, ((0, 0),), r"the path \(0, 0\)"),
        (2, ((0,), (2,)), r"slices in 0\.\.1"),
        (2, ((-1,),), r"the path \(-1,\)"),
        (2, ((True,),), r"the path \(True,\)"),
        (2, ((1.0,),), r"the path \(1\.0,\)"),
        (2, ((1,), (0,)), "sorted"),
        (3, ((0, 1), (2,)), "sorted"),
        (2, [(0,), (1,)], "sorted"),
    ],
)
def test_malformed_tree_is_refused(slices, sequences, wanted):
    with pytest.raises(ValueError, match=wanted):
        StageTree(slices, sequences)


@given(trees(), st.randoms())
def test_a_tree_is_read_back_in_any_order(tree, shuffler):
    data = json.loads(json.dumps(tree.to_json()))
    shuffler.shuffle(data["sequences"])
    with TemporaryDirectory() as folder:
        file = Path(folder) / "tree.json"
        file.write_text(json.dumps(data))
        assert StageTree.read(file) == tree


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "Expecting value"),
        ("[]", "plan: wanted"),
        ('{"slices": 2}', "plan: wanted"),
        ('{"slices": 2, "sequences": []}', "at least one, got none"),
        ('{"slices": 2, "sequences": [[0], [0, 1]]}', "none the beginning of another, got 2, of which 1 make"),
        ('{"slices": 2, "sequences": [[0, 1], [0, 1]]}', "got 2, of which 1"),
        ('{"slices": 2, "sequences": [[], [0, 1]]}', "got 2, of which 1"),
        ('{"slices": 2, "sequences": [[0, 2]]}', r"slices in 0\.\.1, got the path \(0, 2\)"),
        ('{"slices": 2, "sequences": ["01"]}', r"got the path \('0', '1'\)"),
        ('{"slices": 2, "sequences": [[0], ["1"]]}', "plan: wanted"),
        ('{"slices": 2, "sequences": [[0, true]]}', r"got the path \(0, True\)"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, wanted):
    file = tmp_path / "tree.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"tree\.json: .*{wanted}"):
        StageTree.read(file)


def test_a_large_plan_is_counted_without_its_nodes():
    """64 slices, all 4032 pairs of a first and a second one: 64 heads, and 63 nodes below for each pair."""
    sequences = [
        (head, second, *(index for index in range(64) if index not in (head, second)))
        for head, second in itertools.permutations(range(64), 2)
    ]
    start = time.process_time()
    tree = StageTree.from_sequences(64, sequences)
    counted = tree.stages, tree.slice_passes, tree.depth, tree.heads
    seconds = time.process_time() - start
    passes = 64 + 4032 * sum(range(2, 65))
    assert counted == (64 + 4032 * 63, passes, 64, tuple(range(64)))
    assert tree.best_live(range(63)) == (63,)
    assert "nodes" not in tree.__dict__
    assert seconds < 2


def test_bad_arguments_are_refused():
    tree = StageTree.from_sequences(2, [(0, 1)])
    with pytest.raises(ValueError, match=r"dirty: wanted slices in 0\.\.1, got \[2\]"):
        tree.best_live({2})
    with pytest.raises(ValueError, match="path"):
        tree.parent((1,))
    for data in ({}, {"slices": 2, "sequences": 3}, {"slices": "2", "sequences": [[0]]}):
        with pytest.raises(ValueError, match="wanted"):
            StageTree.from_json(data)
