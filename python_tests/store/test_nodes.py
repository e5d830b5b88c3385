"""Nodes by content address: atomic, checked, erased."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from s3t_ext.store import nodes
from s3t_ext.store.files import StoreError, write_checked
from s3t_ext.store.nodes import NodeStore
from s3t_ext.store.tensors import decode, encode, weights_hash

CANARY = b"canary-of-the-node"
IDENTITY = {"base": "b" * 64, "slices": ["s" * 64], "shard": 0}
PROVENANCE = {"torch": "2.0", "threads": 1}
TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.float16(3.5).reshape(()),
    "canary": np.frombuffer(CANARY, dtype=np.uint8),
    "empty": np.zeros((0, 4), dtype=np.float32),
}


@pytest.fixture
def store(sealed):
    return NodeStore(sealed())


def test_a_node_comes_back(store):
    node = store.put(IDENTITY, TENSORS, PROVENANCE)
    manifest, tensors = store.get(node)
    assert manifest == {
        "id": node,
        "identity": IDENTITY,
        "weights": weights_hash(TENSORS),
        "provenance": PROVENANCE,
    }
    assert tensors.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (array.dtype, array.shape)
        assert tensors[name].tobytes() == array.tobytes()


def test_identity_is_not_provenance(store):
    node = store.put(IDENTITY, TENSORS, PROVENANCE)
    assert store.put(dict(reversed(IDENTITY.items())), TENSORS, {"torch": "3.0"}) == node
    assert store.manifest(node)["provenance"] == PROVENANCE
    assert store.put({**IDENTITY, "shard": 1}, TENSORS, PROVENANCE) != node


def test_other_weights_for_one_identity_are_refused(store):
    node = store.put(IDENTITY, TENSORS, PROVENANCE)
    with pytest.raises(StoreError, match=f"node {node} is stored with weights .* not reproducible"):
        store.put(IDENTITY, {**TENSORS, "a": TENSORS["a"] + 1}, PROVENANCE)


def test_a_put_that_fails_anywhere_can_be_repeated(tmp_path, sealed, fail_call):
    for fatal in range(1, 100):
        store = NodeStore(sealed(tmp_path / str(fatal)))
        made = fail_call(fatal)
        try:
            node = store.put(IDENTITY, TENSORS, PROVENANCE)
        except StoreError:
            fail_call(0)
            before = store.has(nodes.address(IDENTITY))
            assert before == (made[: fatal - 1].count("replace") == 2)
            node = store.put(IDENTITY, TENSORS, PROVENANCE)
            assert store.get(node)[0]["weights"] == weights_hash(TENSORS)
        else:
            break
    assert fatal == len(made) + 1 == 9


def test_every_flipped_byte_is_seen_or_changes_nothing(store):
    node = store.put(IDENTITY, TENSORS, PROVENANCE)
    whole = store.get(node)
    for path in (store.folder / f"{node}.sealed", store.folder / f"{node}.json"):
        data, seen = path.read_bytes(), 0
        sealed = path.suffix == ".sealed"
        tried = range(0, len(data), 5 if sealed else 1)  # every byte of a sealed file: test_crypt.py
        for index in tried:
            path.write_bytes(data[:index] + bytes([data[index] ^ 1 << index % 8]) + data[index + 1 :])
            try:
                manifest, tensors = store.get(node)
            except StoreError:
                seen += 1
            else:
                assert manifest == whole[0]
                assert weights_hash(tensors) == weights_hash(whole[1])
        assert seen == sum(not (sealed and 76 <= index < 1024) for index in tried)  # all but the head's unused bytes
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(StoreError, match=node):
            store.get(node)
        path.write_bytes(data)


def test_a_manifest_of_another_node_or_format_is_refused(store, monkeypatch):
    node = store.put(IDENTITY, TENSORS, PROVENANCE)
    other = store.put({**IDENTITY, "shard": 1}, TENSORS, PROVENANCE)
    for manifest in (store.manifest(node), {**store.manifest(node), "id": other}):
        write_checked(store.folder / f"{other}.json", manifest)
        with pytest.raises(StoreError, match=f"describes node {node}, not {other}"):
            store.get(other)
    monkeypatch.setattr("s3t_ext.store.files.FORMAT", 7)
    write_checked(store.folder / f"{node}.json", {})
    monkeypatch.undo()
    with pytest.raises(StoreError, match="has format 7, this version of s3t_ext reads format 2"):
        store.get(node)


def test_a_blob_that_a_killed_put_left_is_overwritten(store):
    """Killed before the manifest: nothing names the old weights, which may be of the same node once more."""
    node = store.put(IDENTITY, TENSORS, PROVENANCE)
    (store.folder / f"{node}.json").unlink()
    with open(store.folder / f"{node}.sealed", "rb") as left:
        assert store.put(IDENTITY, TENSORS, PROVENANCE) == node
        assert not any(left.read())
    assert weights_hash(store.get(node)[1]) == weights_hash(TENSORS)


def test_erasing_leaves_no_byte(store, tmp_path, content):
    node = store.put(IDENTITY, TENSORS, PROVENANCE)
    assert CANARY not in content(tmp_path)
    with open(store.folder / f"{node}.sealed", "rb") as blob:
        store.erase(node)
        assert not any(blob.read())  # overwritten, not only unlinked
    assert not store.has(node)
    assert list(store.folder.iterdir()) == []
    store.erase(node)
    with pytest.raises(StoreError, match=node):
        store.get(node)


def test_an_erasure_that_fails_anywhere_can_be_repeated(tmp_path, sealed, fail_call):
    for fatal in range(1, 100):
        fail_call(0)
        store = NodeStore(sealed(tmp_path / str(fatal)))
        node = store.put(IDENTITY, TENSORS, PROVENANCE)
        made = fail_call(fatal)
        try:
            store.erase(node)
        except StoreError:
            fail_call(0)
            if "write" in made[:-1]:  # the wrapped key goes first
                with pytest.raises(StoreError):
                    store.get(node)
            store.erase(node)
        else:
            break
        assert not store.has(node)
        assert list(store.folder.iterdir()) == []
    assert fatal == len(made) + 1 == 7


def test_a_node_name_is_no_path(store):
    for name in ("../x", "A" * 64, "", "a" * 63):
        with pytest.raises(ValueError, match="64 hex digits"):
            store.has(name)


@given(
    hnp.arrays(st.sampled_from([np.float32, np.int64, np.uint8, np.bool_]), hnp.array_shapes(min_dims=0, min_side=0))
)
def test_weights_hash_sees_values_not_layout(array):
    before = weights_hash({"x": array})
    assert before == weights_hash({"x": np.array(array, order="F")})
    assert before == weights_hash({"x": array.astype(array.dtype.newbyteorder(">"))})
    assert before == weights_hash(decode(encode({"x": array})))
    assert before == weights_hash(decode(encode({"x": np.array(array, order="F")})))
    assert before == weights_hash(decode(encode({"x": array.astype(array.dtype.newbyteorder(">"))})))
    different = [{"y": array}, {"x": array[None]}, {"x": array, "y": array}, {}]
    if array.size:
        changed = array.copy()
        changed.reshape(-1).view(np.uint8)[-1] ^= 1
        different.append({"x": changed})
    assert before not in map(weights_hash, different)


def test_weights_hash_is_fixed():
    """Stored hashes must stay readable: this value may change only with the store's format."""
    assert (
        weights_hash({"w": np.array([[1.0, -0.0]], dtype=np.float32)})
        == "f5d32f0c256f8d71c9faed095e9e826ac1b24edbf9ca8f0807f40f1fd14b8d18"
    )


def test_odd_types_are_refused(store):
    with pytest.raises(ValueError, match="'x' wanted numbers or booleans"):
        store.put(IDENTITY, {"x": np.array(["text"])}, PROVENANCE)
