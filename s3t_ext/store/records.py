"""The private records, one sealed file a slice, so that a deletion rewrites no other slice."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s3t_ext.store.files import Damaged, StoreError, canonical_json, destroy, exists, system_errors
from s3t_ext.store.sealed import SealedFiles
from s3t_ext.store.tensors import decode, encode


class Lost(StoreError):
    """The records of one slice cannot be read, and no repetition helps: the file is missing, or damaged.

    Args:
        cell: (shard, slice); ``missing``: whether there is no file.
    """

    def __init__(self, message: str, cell: tuple[int, int], missing: bool) -> None:
        super().__init__(message, cell, missing)
        self.message, self.cell, self.missing = message, cell, missing

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, eq=False)
class SliceRecords:
    """The records of one slice, row by row.

    Args:
        inputs: (n, *shape) float32 or uint8, or (n, max_length) int32 token ids.
        labels: (n,) int64, (n, targets) float32, or (n, max_length) int64.
        subjects: n lists of subjects; the first of each owns the record.
        keys: n distinct record keys of equal length.
        salts: n commitment salts of equal length.

    Raises:
        ValueError: the lengths disagree, or a record key comes twice.
    """

    inputs: np.ndarray
    labels: np.ndarray
    subjects: list[list[str]]
    keys: list[bytes]
    salts: list[bytes]

    def __post_init__(self) -> None:
        fields = ("inputs", "labels", "subjects", "keys", "salts")
        lengths = {name: len(getattr(self, name)) for name in fields}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"records: wanted fields of equal length, got {lengths}")
        for name in ("keys", "salts"):
            if len({len(value) for value in getattr(self, name)}) > 1:
                raise ValueError(f"{name}: wanted values of equal length")
        if len(set(self.keys)) != len(self.keys):
            raise ValueError("keys: wanted distinct record keys, got one twice")

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Collection[int]) -> SliceRecords:
        """Return the given rows, in the given order."""
        index = np.fromiter(rows, dtype=np.int64, count=len(rows))  # (k,)
        return SliceRecords(
            inputs=self.inputs[index],
            labels=self.labels[index],
            subjects=[self.subjects[row] for row in rows],
            keys=[self.keys[row] for row in rows],
            salts=[self.salts[row] for row in rows],
        )


def join(pieces: Sequence[SliceRecords]) -> SliceRecords:
    """Give the rows of several pieces as one."""
    if len(pieces) == 1:
        return pieces[0]
    lists = {name: [row for piece in pieces for row in getattr(piece, name)] for name in ("subjects", "keys", "salts")}
    return SliceRecords(
        np.concatenate([piece.inputs for piece in pieces]), np.concatenate([piece.labels for piece in pieces]), **lists
    )


def pack(records: SliceRecords) -> bytes:
    """Encode records.

    Raises:
        ValueError: inputs or labels of a type that is not numbers.
    """
    return encode(
        {
            "inputs": records.inputs,
            "labels": records.labels,
            "subjects": np.frombuffer(canonical_json(records.subjects), dtype=np.uint8),
            "keys": _rows(records.keys),
            "salts": _rows(records.salts),
        }
    )


def unpack(data: bytes) -> SliceRecords:
    """Decode what `pack` encoded."""
    tensors = decode(data)
    return SliceRecords(
        inputs=tensors["inputs"],
        labels=tensors["labels"],
        subjects=json.loads(tensors["subjects"].tobytes()),
        keys=[row.tobytes() for row in tensors["keys"]],
        salts=[row.tobytes() for row in tensors["salts"]],
    )


class RecordStore:
    """Slices in the folder `records`, one file each, rows in ascending order of record key.

    The order makes what is read back, and so what is trained, independent of the row order of the table.
    """

    def __init__(self, files: SealedFiles) -> None:
        self.files, self.folder = files, files.root / "records"

    def put(self, shard: int, slice_: int, records: SliceRecords) -> None:
        """Write a slice atomically; content that it replaces is overwritten.

        Raises:
            StoreError: it cannot be written; the old content is as it was.
            ValueError: inputs or labels of a type that is not numbers.
        """
        order = sorted(range(len(records)), key=records.keys.__getitem__)
        data = pack(records.take(order) if order != list(range(len(order))) else records)
        with system_errors("create", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.files.write(self._path(shard, slice_), data, destroy_old=True)

    def get(self, shard: int, slice_: int) -> SliceRecords:
        """Read a slice.

        Raises:
            Lost: it is missing or damaged; the message says what is to be done.
            StoreError: it cannot be read now, or the store key is missing.
        """
        _ = self.files.key  # without it nothing is known to be lost
        try:
            return unpack(self.files.read(self._path(shard, slice_)))
        except StoreError as error:
            missing = isinstance(error.__cause__, FileNotFoundError)
            if not missing and not isinstance(error, Damaged):
                raise
            raise Lost(
                f"{error}. The records of slice {shard}-{slice_}: `s3t restore BACKUP STORE` brings them back. Without "
                "one what is trained serves on, requests act on it at once, and all other slices go on; of this one "
                f"nothing can be erased, healed or trained on, until `s3t erase STORE --lost {shard}-{slice_}` gives "
                "it up, and what was trained on it",
                (shard, slice_),
                missing,
            ) from error

    def erase_subjects(self, shard: int, slice_: int, subjects: Collection[str]) -> int:
        """Rewrite a slice without the records that name any of `subjects`, salts and keys included.

        Returns:
            How many records went. The old file is overwritten before it is unlinked; 0 leaves it untouched.

        Raises:
            StoreError: as ``get``, or the slice cannot be rewritten.
        """
        records = self.get(shard, slice_)
        gone = set(subjects)
        kept = [row for row, names in enumerate(records.subjects) if gone.isdisjoint(names)]
        if len(kept) < len(records):
            self.put(shard, slice_, records.take(kept))
        return len(records) - len(kept)

    def erase(self, shard: int, slice_: int) -> None:
        """Overwrite and unlink a whole slice; one that is not there is fine."""
        destroy(self._path(shard, slice_))

    def has(self, shard: int, slice_: int) -> bool:
        """Return whether a slice has a file; whether it can be read is told by `get`."""
        return exists(self._path(shard, slice_))

    def size(self, shard: int, slice_: int) -> int:
        """Tell how many bytes a slice takes on disk; 0 if it is not there."""
        path = self._path(shard, slice_)
        return path.stat().st_size if exists(path) else 0

    def largest(self) -> int:
        """Tell how many bytes the largest slice takes on disk."""
        sizes = [0]
        for path in self.folder.glob("*.sealed"):
            with suppress(FileNotFoundError):  # given up meanwhile
                sizes.append(path.stat().st_size)
        return max(sizes)

    def keep(self, cells: Collection[tuple[int, int]]) -> None:
        """Overwrite and unlink the slices that are none of these."""
        with system_errors("read", self.folder):
            found = set(self.folder.glob("*.sealed"))
        for path in found - {self._path(*cell) for cell in cells}:
            destroy(path)

    def _path(self, shard: int, slice_: int) -> Path:
        return self.folder / f"{shard}-{slice_}.sealed"


def _rows(values: list[bytes]) -> np.ndarray:
    width = len(values[0]) if values else 0
    return np.frombuffer(b"".join(values), dtype=np.uint8).reshape(len(values), width)  # (n, width)
