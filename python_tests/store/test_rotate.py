"""A new store key, killed or failing at any call that changes a file: the store opens, and the same command ends it."""

import errno
import itertools
import os
import shutil

import pytest

from s3t_ext.store import crypt, sealed
from s3t_ext.store import rotate as rotation
from s3t_ext.store.crypt import StoreKey, grant, revoke, seal, unseal
from s3t_ext.store.files import StoreError, atomic_write, outside, write_checked
from s3t_ext.store.rotate import rotate
from s3t_ext.store.sealed import SealedFiles

CONTENTS = {"key": b"k", "signing-key": b"s", "nodes/aa": b"n" * 5000, "records/0-0": b"r", "records/0-1": b""}
NEW = StoreKey(bytes(range(32)))


@pytest.fixture
def store(tmp_path):
    return make(tmp_path / "store")


def make(store, key=None):
    """Make the sealed files of a store, store.json and the key beside it."""
    key, given = key or StoreKey.new(), key
    for folder in ("nodes", "records"):
        (store / folder).mkdir(parents=True)
    write_checked(store / "store.json", {"schema": {}, "store_key": key.name})
    files = SealedFiles(store)
    if given is None:
        key.keep(outside(store, "key"))
    for name, data in CONTENTS.items():
        files.write(place(store, name), data)
    return store


def place(store, name):
    return store / f"{name}.sealed" if "/" in name else store / name


def contents(store):
    """Read every file as a new process does."""
    files = SealedFiles(store)
    return {name: files.read(place(store, name)) for name in CONTENTS}


def assert_ended(store, old):
    """The new key opens all, alone, and nothing of the old one is left."""
    new = StoreKey.find(store)
    assert new != old
    assert contents(store) == CONTENTS
    assert [path.name for path in sorted(store.parent.iterdir()) if path != store] == ["store.key"]
    for path in [*(place(store, name) for name in CONTENTS), outside(store, "key")]:
        data = path.read_bytes()
        assert bytes.fromhex(old.name) not in data, path
        assert old._secret.hex().encode() not in data
    for name in CONTENTS:
        with pytest.raises(ValueError, match="not sealed for"):
            unseal(name, place(store, name).read_bytes(), old)


def test_after_it_the_old_key_opens_nothing(store):
    old = StoreKey.find(store)
    with open(outside(store, "key"), "rb") as file:
        report = rotate(store)
        assert not any(file.read()), "the old key file is overwritten"
    assert (report["files"], report["damaged"], report["key"]) == (5, [], StoreKey.find(store).name)
    assert_ended(store, old)
    assert rotate(store)["key"] != report["key"], "and again"


def test_a_given_key_is_taken_and_another_than_the_own_is_wanted(store, tmp_path):
    old = StoreKey.find(store)
    (tmp_path / "safe").mkdir()
    NEW.keep(tmp_path / "safe" / "new")
    assert rotate(store, tmp_path / "safe" / "new")["key"] == NEW.name
    assert StoreKey.find(store) == NEW != old
    with pytest.raises(ValueError, match="another key than the store's own"):
        rotate(store, tmp_path / "safe" / "new")
    with pytest.raises(StoreError, match="cannot read"):
        rotate(store, tmp_path / "nosuch")


@pytest.mark.parametrize("begun", [False, True], ids=["alone", "over one that was begun"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, None])
def test_it_ends_from_wherever_it_was_stopped(tmp_path, fail_call, error, begun):
    """`None` kills the process in place of the call; `begun`: first the key of an unfinished rotation is destroyed."""
    stopped, given = 0, tmp_path / "given" if begun else None
    if begun:
        NEW.keep(given)
    for fatal in itertools.count(1):
        fail_call(0)
        store = make(tmp_path / str(fatal) / "store")
        old = StoreKey.find(store)
        if begun:
            StoreKey.new().keep(outside(store, "key.new"))
        if error is None:
            child = os.fork()
            if child == 0:
                fail_call(fatal, action=lambda: os._exit(9))
                rotate(store, given)
                os._exit(0)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        else:
            fail_call(fatal, error)
            try:
                ended = bool(rotate(store, given))
            except StoreError:
                ended = False
        fail_call(0)
        if ended:
            break
        stopped += 1
        named = StoreKey.find(store)
        assert contents(store) == CONTENTS, fatal
        for name in CONTENTS:  # by the one key that the store names
            assert unseal(name, place(store, name).read_bytes(), named) == CONTENTS[name]
        if named != NEW:
            assert rotate(store, given)["key"] == (NEW.name if begun else StoreKey.find(store).name)
        else:
            rotate(store)
        assert_ended(store, old)
    assert_ended(store, old)
    print(f"rotation stopped at each of {stopped} calls ({errno.errorcode.get(error, 'kill')}): it opened, and ended")
    assert stopped >= 30


@pytest.mark.parametrize("left_by", [os.link, shutil.copy], ids=["second name", "copy"])
def test_what_a_killed_run_left_of_the_new_key_goes(store, left_by):
    """Killed between the link and the unlink, the two names are of one file: who overwrites it has lost the key."""
    old, new = StoreKey.find(store), outside(store, "key.new")
    StoreKey.new().keep(new)
    left_by(new, new.with_name(f".{new.name}.0.part"))
    rotate(store)
    assert_ended(store, old)
    left_by(outside(store, "key"), new.with_name(f".{new.name}.1.part"))
    key = StoreKey.find(store)
    StoreKey.sweep(new)
    assert StoreKey.find(store) == key
    rotate(store)
    assert_ended(store, key)


def test_where_the_key_is_in_the_environment(tmp_path, monkeypatch):
    old, store, file = StoreKey.new(), tmp_path / "store", tmp_path / "new"
    monkeypatch.setenv("S3T_STORE_KEY", old._secret.hex())
    make(store, old)
    with pytest.raises(ValueError, match="new_key: the store key is in S3T_STORE_KEY"):
        rotate(store)
    monkeypatch.setattr(rotation, "revoke", lambda *_: os._exit(1))
    child = os.fork()
    if child == 0:
        rotate(store, file)  # killed after the switch
    os.waitpid(child, 0)
    monkeypatch.undo()
    assert not outside(store, "key").exists()
    monkeypatch.setenv("S3T_STORE_KEY", old._secret.hex())
    with pytest.raises(StoreError, match="of another store"):
        contents(store)
    rotate(store, file)
    monkeypatch.setenv("S3T_STORE_KEY", file.read_text())
    assert contents(store) == CONTENTS
    for name in CONTENTS:
        with pytest.raises(ValueError, match="not sealed for"):
            unseal(name, place(store, name).read_bytes(), old)


def test_a_file_that_no_key_opens_is_named_and_left(store):
    path = place(store, "records/0-0")
    data = bytearray(path.read_bytes())
    data[40] ^= 1  # in the wrapped key
    path.write_bytes(data)
    report = rotate(store)
    assert (report["files"], report["damaged"]) == (4, ["records/0-0"])
    assert path.read_bytes() == data


def test_another_new_key_than_that_of_an_unfinished_rotation(store, tmp_path, monkeypatch):
    (tmp_path / "safe").mkdir()
    NEW.keep(tmp_path / "safe" / "new")
    for broken in ("grant", "revoke"):
        monkeypatch.setattr(rotation, broken, failing)
        with pytest.raises(StoreError, match="the disk fails"):
            rotate(store)
        monkeypatch.undo()
        if broken == "grant":  # nothing depends on the first one yet
            rotate(store, tmp_path / "safe" / "new")
            assert StoreKey.find(store) == NEW
    other = tmp_path / "safe" / "other"
    StoreKey.new().keep(other)
    with pytest.raises(ValueError, match="is unfinished; end it first"):
        rotate(store, other)
    rotate(store)
    assert contents(store) == CONTENTS


def test_a_rotation_between_key_and_file_is_seen_by_a_reader(store, monkeypatch):
    files, path, read, rotated = SealedFiles(store), place(store, "nodes/aa"), sealed.read_bytes, []

    def overtaken(path):
        if not rotated:
            rotated.append(rotate(store))
        return read(path)

    monkeypatch.setattr(sealed, "read_bytes", overtaken)
    assert files.read(path) == CONTENTS["nodes/aa"]
    assert rotated


@pytest.mark.parametrize("look", ["read_checked", "read_bytes"])
def test_a_rotation_while_the_key_is_looked_for(store, monkeypatch, look):
    """It ends between two looks of a process that starts: at store.json, or at the key file."""
    whole, rotated = getattr(crypt, look), []

    def overtaken(path):
        found = whole(path) if look == "read_checked" else None
        if not rotated:
            rotated.append(None)
            rotate(store)
        return whole(path) if found is None else found

    monkeypatch.setattr(crypt, look, overtaken)
    key = StoreKey.find(store)
    assert rotated
    monkeypatch.undo()
    assert key == StoreKey.find(store)
    assert contents(store) == CONTENTS


def failing(*_):
    raise StoreError("the disk fails")


def test_slots(tmp_path):
    path, one, two, three = tmp_path / "key", StoreKey.new(), StoreKey.new(), StoreKey.new()
    atomic_write(path, seal("key", b"data", one))
    for _ in range(2):
        grant(path, "key", one, two)
        assert [unseal("key", path.read_bytes(), key) for key in (one, two)] == [b"data"] * 2
    grant(path, "key", two, three)  # takes the slot of the first
    with pytest.raises(ValueError, match="not sealed for"):
        unseal("key", path.read_bytes(), one)
    for _ in range(2):
        revoke(path, "key", three)
        assert path.read_bytes()[crypt.SLOT :][: crypt.SLOT] == bytes(crypt.SLOT)
    assert unseal("key", path.read_bytes(), three) == b"data"
    for change in (lambda: grant(path, "key", one, two), lambda: revoke(path, "key", two)):
        with pytest.raises(ValueError, match="not sealed for"):
            change()
