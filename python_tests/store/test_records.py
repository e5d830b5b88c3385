"""Records by slice: order, checks, and rewriting without the deleted."""

import dataclasses

import numpy as np
import pytest

from s3t_ext.store.files import StoreError, sweep
from s3t_ext.store.records import RecordStore, SliceRecords

CANARY = b"canary-of-mallory"


def records(n=6):
    generator = np.random.default_rng(3)
    inputs = generator.integers(0, 255, (n, len(CANARY)), dtype=np.uint8)
    inputs[n // 2] = np.frombuffer(CANARY, dtype=np.uint8)
    return SliceRecords(
        inputs=inputs,
        labels=np.arange(n),
        subjects=[["mallory", "eve"] if row == n // 2 else [f"user {row}", "bob"] for row in range(n)],
        keys=[generator.bytes(32) for _ in range(n)],
        salts=[generator.bytes(16) for _ in range(n)],
    )


def fields(part):
    return (part.inputs.tobytes(), part.inputs.shape, part.labels.tobytes(), part.subjects, part.keys, part.salts)


@pytest.fixture
def store(sealed):
    return RecordStore(sealed())


def test_records_come_back_in_key_order_whatever_the_row_order(store):
    given = records()
    store.put(1, 2, given)
    first = store.get(1, 2)
    assert first.keys == sorted(given.keys)
    assert fields(first) == fields(given.take(sorted(range(6), key=given.keys.__getitem__)))
    store.put(1, 2, given.take([5, 0, 3, 1, 4, 2]))
    assert fields(store.get(1, 2)) == fields(first)


def test_an_empty_slice_comes_back(store):
    empty = records().take([])
    store.put(0, 0, empty)
    assert fields(store.get(0, 0)) == fields(empty)
    assert store.erase_subjects(0, 0, ["mallory"]) == 0


@pytest.mark.parametrize("subject", ["mallory", "eve"])
def test_erasing_a_subject_leaves_the_others_and_no_byte(store, tmp_path, content, subject):
    given = records()
    store.put(0, 0, given)
    for secret in (CANARY, b"mallory", b"user 1", *given.keys, *given.salts):
        assert secret not in content(tmp_path)
    with open(store.folder / "0-0.sealed", "rb") as old:
        assert store.erase_subjects(0, 0, [subject]) == 1
        assert not any(old.read())  # overwritten, not only unlinked
    left = store.files.read(store.folder / "0-0.sealed")
    for secret in (CANARY, b"mallory", b"eve", given.keys[3], given.salts[3]):
        assert secret not in left
    rest = given.take([0, 1, 2, 4, 5])
    assert fields(store.get(0, 0)) == fields(rest.take(sorted(range(5), key=rest.keys.__getitem__)))
    assert [path.name for path in store.folder.iterdir()] == ["0-0.sealed"]
    assert store.erase_subjects(0, 0, [subject]) == 0


def test_erasing_everyone_leaves_an_empty_slice(store):
    store.put(0, 0, records())
    assert store.erase_subjects(0, 0, ["bob", "eve"]) == 6
    assert len(store.get(0, 0)) == 0


def test_an_erasure_that_fails_anywhere_can_be_repeated(tmp_path, sealed, fail_call):
    for fatal in range(1, 100):
        fail_call(0)
        store = RecordStore(sealed(tmp_path / str(fatal)))
        store.put(0, 0, records())
        made = fail_call(fatal)
        try:
            store.erase_subjects(0, 0, ["mallory"])
        except StoreError:
            fail_call(0)
            assert len(store.get(0, 0)) in (5, 6)
            store.erase_subjects(0, 0, ["mallory"])
            assert len(store.get(0, 0)) == 5
            sweep(tmp_path)  # the next writer's lock does so
            assert [path.name for path in store.folder.iterdir()] == ["0-0.sealed"]
        else:
            break
    assert fatal == len(made) + 1 == 9


def test_flipped_bytes_are_seen_or_change_nothing(store):
    store.put(0, 0, records(2))
    path = store.folder / "0-0.sealed"
    whole, data = fields(store.get(0, 0)), path.read_bytes()
    seen = 0
    tried = range(0, len(data), 5)  # every byte of a sealed file: test_crypt.py
    for index in tried:
        path.write_bytes(data[:index] + bytes([data[index] ^ 1 << index % 8]) + data[index + 1 :])
        try:
            assert fields(store.get(0, 0)) == whole
        except StoreError:
            seen += 1
    assert seen == sum(not 76 <= index < 1024 for index in tried)  # all but the head's unused bytes
    path.write_bytes(data[:-1])
    with pytest.raises(StoreError, match=r"0-0\.sealed is damaged"):
        store.get(0, 0)


def test_missing_slice_and_whole_erasure(store):
    with pytest.raises(StoreError, match=r"cannot read .*4-1\.sealed"):
        store.get(4, 1)
    store.put(4, 1, records())
    store.erase(4, 1)
    store.erase(4, 1)
    assert list(store.folder.iterdir()) == []


def test_malformed_records_are_refused(store):
    given = records()
    for change, wanted in (
        ({"labels": np.arange(5)}, "equal length"),
        ({"keys": [given.keys[0]] * 6}, "distinct"),
        ({"salts": [b"x", *given.salts[1:]]}, "salts: wanted values of equal length"),
    ):
        with pytest.raises(ValueError, match=wanted):
            dataclasses.replace(given, **change)
    with pytest.raises(ValueError, match="'inputs' wanted numbers"):
        store.put(0, 0, dataclasses.replace(given, inputs=np.array(["text"] * 6)))
