"""Faults for the store's tests: the n-th system call that changes the disk fails."""

import errno
import os

import pytest

from s3t_ext.store.crypt import StoreKey
from s3t_ext.store.sealed import SealedFiles

CALLS = ("write", "pwrite", "fsync", "link", "replace")


@pytest.fixture
def fail_call(monkeypatch):
    """Return a function that makes the n-th call to the disk raise, or do `action`; calling it starts a new count."""
    originals = {name: getattr(os, name) for name in CALLS}

    def arm(fatal, error=errno.ENOSPC, action=None):
        made = []

        def guarded(name):
            def call(*args, **kwargs):
                made.append(name)
                if len(made) == fatal:
                    if action:
                        action()
                    raise OSError(error, os.strerror(error))
                return originals[name](*args, **kwargs)

            return call

        for name in CALLS:
            monkeypatch.setattr(os, name, guarded(name))
        return made

    return arm


@pytest.fixture
def sealed(tmp_path):
    """Return a function that gives the sealed files of a folder, all under one store key; default: `tmp_path`."""
    key = StoreKey.new()
    return lambda root=tmp_path: SealedFiles(root, key)


@pytest.fixture
def content():
    """Return a function that joins the bytes of all files below a folder."""
    return lambda folder: b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
