"""Sealed files and the store key that opens them."""

import os
import pickle
import stat
import warnings

import pytest

from s3t_ext.store import crypt
from s3t_ext.store.crypt import HEAD, SLOT, StoreKey, seal, unseal
from s3t_ext.store.files import StoreError, destroy, outside, write_checked
from s3t_ext.store.sealed import SealedFiles

KEY, OTHER = StoreKey(bytes(range(32))), StoreKey(bytes(32))
DATA = b"the content of a file"
USED = 16 + 12 + 32 + 16  # bytes of a slot: name, nonce, key and its tag


@pytest.fixture
def store(tmp_path):
    """Return a folder with what a store says of its key, and that key beside it."""
    (tmp_path / "store").mkdir()
    write_checked(tmp_path / "store" / "store.json", {"store_key": KEY.name})
    KEY.keep(tmp_path / "store.key")
    return tmp_path / "store"


@pytest.mark.parametrize("segment", [crypt._SEGMENT, 5, len(DATA)])
def test_content_comes_back_and_is_nowhere_in_plain(segment, monkeypatch):
    monkeypatch.setattr(crypt, "_SEGMENT", segment)
    for data in (DATA, b"", DATA * 100):
        sealed = seal("key", data, KEY)
        assert unseal("key", sealed, KEY) == data
        assert not data or data not in sealed
        assert sealed != seal("key", data, KEY), "a fresh key each time"


@pytest.mark.parametrize("segment", [crypt._SEGMENT, 8])
def test_every_changed_byte_and_every_cut_is_seen(segment, monkeypatch):
    monkeypatch.setattr(crypt, "_SEGMENT", segment)
    sealed, seen = seal("key", DATA, KEY), 0
    for index in range(len(sealed)):
        for flip in (1 << index % 8, 255):
            changed = sealed[:index] + bytes([sealed[index] ^ flip]) + sealed[index + 1 :]
            if USED <= index < HEAD:  # the rest of the slot, and the slot that is free
                assert unseal("key", changed, KEY) == DATA
            else:
                with pytest.raises(ValueError, match=r"not sealed for|does not match its seal"):
                    unseal("key", changed, KEY)
                seen += 1
        with pytest.raises(ValueError, match=r"not sealed for|does not match its seal"):
            unseal("key", sealed[:index], KEY)
    assert seen == 2 * (len(sealed) - HEAD + USED)
    with pytest.raises(ValueError, match="does not match"):
        unseal("key", sealed + b"\0", KEY)
    print(f"{seen} flips seen, {2 * (HEAD - USED)} without effect, {len(sealed)} cuts seen")


def test_segments_keep_their_order_and_number(monkeypatch):
    monkeypatch.setattr(crypt, "_SEGMENT", 8)
    sealed = seal("key", bytes(range(24)), KEY)
    first, second, third = (sealed[HEAD + i * 24 : HEAD + (i + 1) * 24] for i in range(3))
    for parts in ((second, first, third), (first, second), (first, third), (first, second, third, third)):
        with pytest.raises(ValueError, match="does not match its seal"):
            unseal("key", sealed[:HEAD] + b"".join(parts), KEY)


def test_a_file_opens_under_its_own_name_and_key_alone():
    sealed = seal("records/0-1", DATA, KEY)
    with pytest.raises(ValueError, match="does not match its seal"):
        unseal("records/0-2", sealed, KEY)
    with pytest.raises(ValueError, match=f"not sealed for the store key {OTHER.name[:8]}"):
        unseal("records/0-1", sealed, OTHER)
    stranger = seal("records/0-1", b"x" * len(DATA), KEY)
    for at in (slice(0, HEAD), slice(HEAD, None), slice(16, USED)):  # head, content, wrapped key of another one
        mixed = bytearray(sealed)
        mixed[at] = stranger[at]
        with pytest.raises(ValueError, match="does not match its seal"):
            unseal("records/0-1", bytes(mixed), KEY)


def test_files_are_bound_to_their_place(sealed, tmp_path):
    files = sealed()
    (tmp_path / "records").mkdir()
    one, two = (tmp_path / "records" / f"0-{i}.sealed" for i in range(2))
    files.write(one, b"one")
    files.write(two, b"two")
    assert (files.read(one), files.read(two)) == (b"one", b"two")
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    for path in (one, two):
        with pytest.raises(StoreError, match=rf"{path.name} is damaged: .*; restore it"):
            files.read(path)


def test_the_key_is_never_shown(tmp_path):
    secret = KEY._secret
    for shown in (repr(KEY), str(KEY), f"{[KEY]}", KEY.name):
        assert secret.hex()[:8] not in shown
        assert secret.hex() not in shown
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(KEY)
    with pytest.raises(TypeError):
        hash(KEY)
    KEY.keep(tmp_path / "store.key")
    (tmp_path / "store.key").write_text(secret.hex()[:-1] + "x")
    with pytest.raises(StoreError, match=r"store\.key is not a store key: wanted 64 hex digits") as raised:
        StoreKey.load(tmp_path / "store.key")
    assert secret.hex()[:8] not in str(raised.value)
    assert StoreKey.new() != StoreKey.new()


# Where it is kept


def test_the_key_is_found_beside_the_store(store, monkeypatch, tmp_path):
    path = outside(store, "key")
    assert StoreKey.find(store) == KEY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    KEY.keep(path)
    with pytest.raises(StoreError, match="holds another store key"):
        OTHER.keep(path)
    assert [entry.name for entry in tmp_path.iterdir() if entry != store] == ["store.key"]
    (tmp_path / "safe").mkdir()
    monkeypatch.setenv("S3T_KEY_FOLDER", str(tmp_path / "safe"))
    with pytest.raises(StoreError, match="is missing"):
        StoreKey.find(store)
    path.rename(tmp_path / "safe" / "store.key")
    assert StoreKey.find(store) == KEY
    monkeypatch.delenv("S3T_KEY_FOLDER")
    monkeypatch.setenv("S3T_STORE_KEY", KEY._secret.hex())
    assert StoreKey.find(store) == StoreKey.draw(store) == KEY


def test_a_lost_key_is_explained(store):
    outside(store, "key").unlink()
    with pytest.raises(StoreError) as raised:
        StoreKey.find(store)
    for said in (KEY.name[:8], "store.key", "nothing was changed", "copy", "S3T_KEY_FOLDER", "S3T_STORE_KEY"):
        assert said in str(raised.value)


def test_another_key_is_named(store, monkeypatch):
    path = outside(store, "key")
    path.write_text(OTHER._secret.hex())
    with pytest.raises(
        StoreError, match=rf"store\.key is the store key {OTHER.name[:8]}.* of another .*{KEY.name[:8]}"
    ):
        StoreKey.find(store)
    path.write_bytes(bytes(64))
    with pytest.raises(StoreError, match=rf"store\.key is not a store key.*{KEY.name[:8]}"):
        StoreKey.find(store)
    with pytest.raises(StoreError, match=r"store\.key is not a store key"):
        StoreKey.draw(store)
    monkeypatch.setenv("S3T_STORE_KEY", OTHER._secret.hex())
    with pytest.raises(StoreError, match=rf"S3T_STORE_KEY is the store key {OTHER.name[:8]}"):
        StoreKey.find(store)
    monkeypatch.setenv("S3T_STORE_KEY", "no key")
    for find in (StoreKey.find, StoreKey.draw):
        with pytest.raises(StoreError, match="S3T_STORE_KEY is not a store key"):
            find(store)


def test_a_key_that_others_can_read_is_warned_of(store):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StoreKey.find(store)
    outside(store, "key").chmod(0o640)
    with pytest.warns(UserWarning, match="can be read by others than its owner: `chmod 600"):
        StoreKey.find(store)


def test_keeping_a_key_that_fails_anywhere_can_be_repeated(tmp_path, fail_call):
    path = tmp_path / "store.key"
    for fatal in range(1, 100):
        fail_call(0)
        path.unlink(missing_ok=True)
        made = fail_call(fatal)
        try:
            KEY.keep(path)
        except StoreError:
            fail_call(0)
            assert not [entry for entry in tmp_path.iterdir() if entry != path]
            assert not path.exists() or StoreKey.load(path) == KEY
            KEY.keep(path)
        else:
            break
    assert StoreKey.load(path) == KEY
    assert fatal == len(made) + 1 == 4


# Destroying


def test_destroying_begins_with_the_wrapped_key(sealed, tmp_path, monkeypatch):
    """Observed from inside: when the first sync has returned, the content is whole, and nothing can open it."""
    files, path = sealed(), tmp_path / "key"
    data = os.urandom(3 << 20)
    files.write(path, data)
    whole = path.read_bytes()
    fsync, seen = os.fsync, []

    def observed(handle):
        fsync(handle)
        seen.append(path.read_bytes() if path.exists() else b"")

    monkeypatch.setattr(os, "fsync", observed)
    destroy(path)
    monkeypatch.undo()
    first, second, gone = seen
    assert first == bytes(4096) + whole[4096:]
    assert second == bytes(len(whole))
    assert gone == b""
    assert 4096 >= HEAD == 2 * SLOT
    with pytest.raises(ValueError, match="not sealed for"):
        unseal("key", first, files.key)


def test_replacing_destroys_the_old_wrapped_key_first(sealed, tmp_path, monkeypatch):
    files, path = sealed(), tmp_path / "key"
    files.write(path, b"old" * 10000)
    with open(path, "rb") as old:
        whole, fsync, seen = old.read(), os.fsync, []
        monkeypatch.setattr(
            os, "fsync", lambda handle: (fsync(handle), seen.append(os.pread(old.fileno(), 1 << 20, 0)))
        )
        files.write(path, b"new", destroy_old=True)
        monkeypatch.undo()
    assert seen == [whole, whole, bytes(4096) + whole[4096:], bytes(len(whole)), bytes(len(whole))]
    assert files.read(path) == b"new"


def test_another_key_is_found_when_the_store_names_one(store):
    """A long-lived reader and writer sees a rotation by another process."""
    files = SealedFiles(store)
    files.write(store / "key", DATA)
    assert files.read(store / "key") == DATA
    outside(store, "key").unlink()
    OTHER.keep(outside(store, "key"))
    (store / "key").write_bytes(seal("key", DATA, OTHER))
    write_checked(store / "store.json", {"store_key": OTHER.name})
    assert files.read(store / "key") == DATA
    files.write(store / "key", DATA)
    assert unseal("key", (store / "key").read_bytes(), OTHER) == DATA
