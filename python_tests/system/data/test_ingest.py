"""Tables laid out: the bytes of a record, equal records, pieces and parts, memory, and what a kill leaves."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny as t

from s3t_ext.ledger.identity import Key, record_key
from s3t_ext.store.beside import sweep_beside
from s3t_ext.store.spool import Spool
from s3t_ext.system.data import ingest
from s3t_ext.system.data.ingest import lay_out, record_bytes
from s3t_ext.system.data.tables import Table

KEY = Key(t.KEY)


def test_no_two_records_share_their_bytes() -> None:
    """Type, shape, values, and where the input ends: all are told apart, and nothing else is."""
    inputs = [np.array(v, kind) for v in ([0, 1], [1, 0], [0, 0, 1]) for kind in ("f4", "u1", "i4")]
    inputs += [np.array([[0, 1]], "f4"), np.array([[0], [1]], "f4"), np.array([-0.0, 1], "f4")]
    inputs += [np.zeros(2, "f4"), np.zeros((2, 0), "f4"), np.zeros((0, 2), "f4")]
    inputs += [np.array([5, -1, -1], "i4"), np.array([5, -1], "i4"), np.array([5], "i4")]
    labels = [np.int64(0), np.int64(1), np.array([0, 1], "f4"), np.array([0], "f4"), np.array([0, 1], "i8")]
    labels += [np.array([-100, 5], "i8"), np.array([0, -100], "i8"), np.float32(0)]
    seen = {record_bytes(x, y) for x, y in itertools.product(inputs, labels)}
    assert len(seen) == len(inputs) * len(labels)
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    same = {record_bytes(x, 1) for x in (rows[1], rows[:, :].T[:, 1], rows[1].astype(">f4"), list(rows)[1])}
    assert len(same) == 1, "how an array lies in memory says nothing"
    assert record_bytes(rows[0], 1) == record_bytes(rows[0], np.int64(1))


def _tables(n: int = 60) -> Table:
    """Give records of several people, every third twice, the copies far apart."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(n, 2)).astype(np.float32)
    inputs[n // 2 :: 3] = inputs[: n - n // 2 : 3]
    names = [(f"p{i % (n // 2) % 7}", "both") if i % 5 == 0 else (f"p{i % (n // 2) % 7}",) for i in range(n)]
    return Table(names, inputs, np.arange(n) % (n // 2) % 3)


def fields(layout) -> dict:
    return {
        cell: (r.keys, r.subjects, r.inputs.tobytes(), r.inputs.shape, r.inputs.dtype, r.labels.tobytes())
        for cell, r in layout.slices.items()
    }


@pytest.mark.parametrize(("piece", "buffer"), [(7, 1), (1, 100), (60, 1), (13, 1 << 20)])
def test_pieces_and_parts_change_nothing(tmp_path, monkeypatch, piece, buffer) -> None:
    table = _tables()
    whole = lay_out(table, KEY, 2, 2)
    monkeypatch.setattr(ingest, "BUFFER", buffer)
    pieces = [t.reorder(table, list(range(60))[i : i + piece]) for i in range(0, 60, piece)]
    with Spool(tmp_path) as spool:
        layout = lay_out(iter(pieces), KEY, 2, 2, spool=spool)
        assert fields(layout) == fields(whole)
        assert fields(layout) == fields(layout), "it can be read more than once"
        cell = max(layout.counts, key=layout.counts.__getitem__)
        assert layout.slices[cell].salts == layout.slices[cell].salts
        salts = [salt for records in layout.slices.values() for salt in records.salts]
        assert len({len(salt) for salt in salts}) == 1 < len(set(salts)) == len(table)
    assert layout.counts == {cell: len(records) for cell, records in whole.slices.items()}


def test_equal_records_have_keys_of_their_own() -> None:
    """The first of equal ones has count 0, the second 1, wherever they stand in the table."""
    table = _tables()
    wanted: dict = {}
    for i, names in enumerate(table.subjects):
        content = record_bytes(table.inputs[i], table.labels[i])
        seen = wanted.setdefault((names, content), [])
        seen.append(record_key(KEY, names, content, len(seen)))
    assert max(map(len, wanted.values())) > 1
    assert lay_out(table, KEY, 2, 2).keys() == {key for keys in wanted.values() for key in keys}


def test_deleted_people_leave_no_part(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ingest, "BUFFER", 1)
    table = _tables()
    gone = ingest.subject_hash(KEY, "p3")
    with Spool(tmp_path) as spool:
        layout = lay_out(table, KEY, 2, 2, {gone}, spool)
        assert layout.dropped == sum("p3" in names for names in table.subjects)
        rest = lay_out(t.without(table, {"p3"}), KEY, 2, 2)
        assert fields(layout) == fields(rest)


SPOOLED = """
import os, sys
from pathlib import Path
import numpy as np
from s3t_ext.ledger.identity import Key
from s3t_ext.store.spool import Spool
from s3t_ext.system.data import ingest
from s3t_ext.system.data.tables import Table
ingest.BUFFER = 1 << 12
marker = np.frombuffer(b"canary-of-mallory-in-a-table" * 8, np.uint8)
table = Table([(f"mallory {i}",) for i in range(200)], np.tile(marker, (200, 1)), np.zeros(200, np.int64))
with Spool(Path(sys.argv[1])) as spool:
    ingest.lay_out(table, Key(bytes(32)), 2, 2, spool=spool)
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def test_nothing_plain_is_written_and_a_kill_leaves_nothing(tmp_path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SPOOLED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline().strip() == str(child.pid)
    assert list(tmp_path.iterdir()) == [], "the parts have no name"
    held = [path for path in Path(f"/proc/{child.pid}/fd").iterdir() if str(tmp_path) in os.readlink(path)]
    content = b"".join(path.read_bytes() for path in held)
    assert len(content) > 200 * 28 * 8, "they are on the disk"
    assert b"canary" not in content
    assert b"mallory" not in content
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdin.close()
    child.stdout.close()
    assert list(tmp_path.iterdir()) == []


STREAMED = """
import sys
from pathlib import Path
import numpy as np
from s3t_ext.ledger.identity import Key
from s3t_ext.store.crypt import StoreKey
from s3t_ext.store.records import RecordStore
from s3t_ext.store.sealed import SealedFiles
from s3t_ext.store.spool import Spool
from s3t_ext.system.data.ingest import lay_out
from s3t_ext.system.data.schema import Schema
from s3t_ext.system.data.tables import read_chunks

folder, schema = Path(sys.argv[1]), Schema(classes=("a", "b"), shape=(1, 256, 256), numbers="uint8")
store = RecordStore(SealedFiles(folder, StoreKey.new()))
def peak():  # the resource module's figure is at least what our parent had
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
with Spool(folder) as spool:
    layout = lay_out(read_chunks(folder / "table.npz", schema), Key(bytes(32)), 8, 8, spool=spool)
    for (shard, slice_), records in layout.slices.items():
        store.put(shard, slice_, records)
print(sum(layout.counts.values()), peak() - before)
"""


def test_a_table_larger_than_memory_is_laid_out(tmp_path) -> None:
    """Peak memory above that of the imports is far below the table's 160 MiB."""
    count = 2560
    images = np.zeros((count, 1, 256, 256), np.uint8)
    images[:, 0, 0, :8] = np.frombuffer(np.arange(count).astype("<u8").tobytes(), np.uint8).reshape(count, 8)
    people = np.array([f"p{i % 640}" for i in range(count)])
    np.savez(tmp_path / "table.npz", subject=people, input=images, label=np.array(["a", "b"] * (count // 2)))
    del images
    told = subprocess.run([sys.executable, "-c", STREAMED, str(tmp_path)], check=True, capture_output=True, text=True)
    records, mebibytes = map(int, told.stdout.split())
    assert records == count
    assert mebibytes < 60, f"{mebibytes} MiB for a table of {count * 65536 >> 20} MiB"


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
import plain
from s3t_ext.store.spool import Spool
from s3t_ext.system.data import ingest
from s3t_ext.system.config import Config
from s3t_ext.system.creation import admit, creating
from s3t_ext.system.data.tables import Table

store, base = map(Path, sys.argv[1:3])
marker = np.frombuffer(b"canary-of-mallory-in-a-table" * 10, np.float32)[:2]
table = Table([(f"mallory {i}",) for i in range(200)], np.tile(marker, (200, 1)), np.zeros(200, np.int64))
ingest.BUFFER = 1 << 10
config = Config(shards=2, slices=2)
with creating(store, plain.SCHEMA, config, plain.KEY, base, "0" * 64, np.zeros((2, 2))) as folder:
    with Spool(folder.path) as spool:
        layout = ingest.lay_out(table, plain.KEY, 2, 2, spool=spool)
        slices = iter(layout.slices.items())
        for _ in range(2):  # two slices of four are written
            (shard, slice_), records = next(slices)
            folder.records.put(shard, slice_, records)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_while_a_store_is_made_leaves_nothing_readable(tmp_path) -> None:
    base, where = tmp_path / "base", tmp_path / "at"
    base.mkdir()
    where.mkdir()
    for name in ("model.json", "weights.safetensors"):
        (base / name).write_bytes(b"no model")
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(where / "store"), str(base)], env=here)
    assert done.returncode == -signal.SIGKILL
    left = [path for path in where.rglob("*") if path.is_file()]
    assert sum("records" in path.parts for path in left) == 2, "it was at it"
    assert not (where / "store").exists()
    for path in left:
        content = path.read_bytes()
        assert b"canary" not in content
        assert b"mallory" not in content
    assert not list(where.glob("*.key")), "the key of what is left was in memory alone"
    sweep_beside(where / "store")
    assert [path for path in where.iterdir() if path.name.startswith(".store")] == []
