"""Atomic writes, checked documents, erasure and the writer lock."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3t_ext.store import files
from s3t_ext.store.crypt import StoreKey
from s3t_ext.store.files import (
    StoreError,
    atomic_write,
    canonical_json,
    destroy,
    exclusive,
    outside,
    read_checked,
    write_checked,
)
from s3t_ext.store.nodes import NodeStore

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.mark.parametrize("destroy_old", [False, True])
def test_a_failed_write_keeps_the_old_content(tmp_path, fail_call, destroy_old):
    path = tmp_path / "file"
    for fatal in range(1, 100):
        fail_call(0)
        atomic_write(path, b"old" * 1000)
        made = fail_call(fatal)
        try:
            atomic_write(path, b"new" * 1000, destroy_old=destroy_old)
        except StoreError:
            replaced = "replace" in made[: fatal - 1]
            assert path.read_bytes() == (b"new" if replaced else b"old") * 1000
            fail_call(0)
            if replaced:
                files.sweep(tmp_path)
            assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
        else:
            break
    assert fatal == len(made) + 1 == (9 if destroy_old else 5)
    assert path.read_bytes() == b"new" * 1000


def killed_at(call, action):
    """Run `action` in a child process that dies, without clean-up, in place of a system call."""
    child = os.fork()
    if child == 0:
        setattr(os, call, lambda *_: os._exit(9))
        action()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_a_killed_write_leaves_nothing_after_the_next_lock(tmp_path, content, call):
    path = tmp_path / "deep" / "file"
    path.parent.mkdir()
    atomic_write(path, b"old")
    killed_at(call, lambda: atomic_write(path, b"canary", destroy_old=True))
    assert b"canary" in content(tmp_path)
    with exclusive(tmp_path):
        assert path.read_bytes() == b"old"
        assert [entry.name for entry in path.parent.iterdir()] == ["file"]
        assert b"canary" not in content(tmp_path)


@pytest.mark.parametrize("destroy_old", [False, True])
def test_what_a_failed_write_wrote_is_overwritten(tmp_path, monkeypatch, destroy_old):
    """And what was there is not: until the rename its second name must go as it is."""
    path, seen = tmp_path / "file", []
    atomic_write(path, b"old")

    def refuse(part, _):
        seen.append(open(part, "rb"))  # noqa: SIM115
        raise OSError(errno.EIO, "no rename")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StoreError, match="no rename"):
        atomic_write(path, b"canary", destroy_old=destroy_old)
    with seen[0] as part:
        assert part.read() == bytes(6)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_looked_at_is_a_store_error(tmp_path, monkeypatch, sealed):
    """The drive fails at a `stat`: a deletion that is acknowledged must be able to say so, not end."""
    (tmp_path / ".x.0.part").touch()

    def fails(*_, **__):
        raise OSError(errno.EIO, "the drive fails")

    monkeypatch.setattr(Path, "stat", fails)
    monkeypatch.setattr(Path, "exists", fails)
    node = NodeStore(sealed())
    for look in (
        lambda: destroy(tmp_path / "file"),
        lambda: files.sweep(tmp_path),
        lambda: node.has("0" * 64),
        lambda: node.erase("0" * 64),
        lambda: StoreKey.draw(tmp_path / "store"),
        lambda: StoreKey.sweep(tmp_path / "x"),
        lambda: sealed().all(),
    ):
        with pytest.raises(StoreError, match="the drive fails; check the disk"):
            look()


def test_replaced_and_destroyed_content_is_overwritten(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, b"canary")
    with open(path, "rb") as old:
        atomic_write(path, b"new", destroy_old=True)
        assert old.read() == bytes(6)
    with open(path, "rb") as old:
        destroy(path)
        assert old.read() == bytes(3)
    destroy(path)
    files.remove(path)
    assert not path.exists()


def test_errors_say_what_to_do(tmp_path, fail_call):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot write .*file/x: Not a directory; check the path"):
        atomic_write(tmp_path / "file" / "x", b"")
    fail_call(1)
    with pytest.raises(StoreError, match="No space left on device; free some space and repeat"):
        atomic_write(tmp_path / "x", b"x")
    fail_call(1, errno.EROFS)
    with pytest.raises(StoreError, match="Read-only file system; make the folder writable"):
        atomic_write(tmp_path / "x", b"x")


@settings(max_examples=50)
@given(plain)
def test_documents_come_back(tmp_path_factory, body):
    path = tmp_path_factory.getbasetemp() / "document"
    write_checked(path, body)
    assert read_checked(path) == body


def test_every_flipped_byte_of_a_document_is_seen(tmp_path):
    path = tmp_path / "document"
    write_checked(path, {"name": "x y", "numbers": [1, 2.5e-3, -0.0], "none": None})
    data = path.read_bytes()
    for index in range(len(data)):
        for flip in (1, 4, 32):
            path.write_bytes(data[:index] + bytes([data[index] ^ flip]) + data[index + 1 :])
            with pytest.raises(StoreError):
                read_checked(path)
        path.write_bytes(data[:index])
        with pytest.raises(StoreError, match="damaged"):
            read_checked(path)


def test_another_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FORMAT", 9)
    write_checked(tmp_path / "document", {})
    monkeypatch.undo()
    with pytest.raises(StoreError, match="has format 9, this version of s3t_ext reads format 2"):
        read_checked(tmp_path / "document")


def test_canonical_json_is_one_spelling():
    assert canonical_json({"b": [1, 2.0, None], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.0,null]}'
    for odd in ({1: 2}, [{"a": {None: 1}}], float("nan"), {"a": float("inf")}, {1, 2}, b"x"):
        with pytest.raises(ValueError, match="value: wanted"):
            canonical_json(odd)


def test_one_writer_at_a_time(tmp_path):
    code = (
        "import sys, time; from s3t_ext.store.files import exclusive\n"
        "with exclusive(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        holder = rf"another process \({other.pid}\) is writing to .*; wait for it"
        with pytest.raises(StoreError, match=holder), exclusive(tmp_path):
            pass
        other.kill()
    with (
        exclusive(tmp_path),  # the lock of a killed process is free
        pytest.raises(StoreError, match="this process is writing"),
        exclusive(tmp_path),
    ):
        pass


def test_what_lies_outside_the_store(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    assert outside(tmp_path / "store", "key") == tmp_path / "store.key"
    monkeypatch.chdir(tmp_path / "store")
    assert outside(".", "anchor") == tmp_path / "store.anchor"
    monkeypatch.setenv("S3T_KEY_FOLDER", "/safe")
    assert outside(".", "key") == Path("/safe/store.key")
