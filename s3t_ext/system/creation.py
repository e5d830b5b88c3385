"""How a store comes to be: declared and written beside its final place, there all at once, its records admitted."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from s3t_ext.ledger import Holding, Ledger
from s3t_ext.ledger.anchor import Anchor
from s3t_ext.ledger.identity import Key, subject_hash
from s3t_ext.ledger.log import Cell
from s3t_ext.ledger.signature import SigningKey
from s3t_ext.models.files import base_files, local_folder
from s3t_ext.store.beside import sweep_beside
from s3t_ext.store.crypt import StoreKey
from s3t_ext.store.files import (
    StoreError,
    advice,
    atomic_write,
    exclusive,
    exists,
    outside,
    sync_folder,
    system_errors,
    write_checked,
)
from s3t_ext.store.sealed import SealedFiles
from s3t_ext.system.config import Config
from s3t_ext.system.data.ingest import Layout
from s3t_ext.system.data.schema import Schema
from s3t_ext.system.folder import DEADLINE_DAYS, Floor, StoreFolder, digest_of, schema_dict


def check_new(path: Path, grow: bool = False) -> None:
    """Refuse a place where no store can be made: to ``grow`` one must be there, and nothing else may be."""
    if grow:
        raise ValueError(f"grow: expected an existing store, got {path}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"store: expected a new or empty folder, got {path}, which holds other files")


@contextmanager
def creating(
    path: Path,
    schema: Schema,
    config: Config,
    key: Key,
    base: Path,
    base_hash: str,
    head: np.ndarray,
    deadline_days: int = DEADLINE_DAYS,
    store_key: StoreKey | None = None,
    floor: Floor | None = None,
    probe: Sequence[float] = (),
) -> Iterator[StoreFolder]:
    """Build a store beside its final place; it appears there, whole, when the block ends.

    All is declared and written here, before the block reads the first private record. What lies outside its folder, its
    key (where `S3T_STORE_KEY` gives none) and its anchor, is written just before it appears; nothing does where a store
    key is given, for then no other process opens it.

    Args:
        probe: what the base model's code gives (`s3t_ext.models.trial`); none: it is not compared.
    """
    path = path.absolute()
    head_bytes = np.ascontiguousarray(head, "<f4").tobytes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_beside(path)
        anchor = None if store_key else outside(path, "anchor")
        if anchor and exists(anchor):
            raise StoreError(
                f"{anchor} is of a store that is not at {path}: restore that one, or move {anchor.name} away"
            )
        kept = None if store_key or os.environ.get("S3T_STORE_KEY") else outside(path, "key")
        if kept and exists(kept):
            raise StoreError(
                f"{kept} is there without a store at {path}: move it away, it may be all that opens another"
            )
        store_key = store_key or StoreKey.draw(path)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))  # mode 0700
    except OSError as error:
        raise StoreError(f"cannot create {path}: {error.strerror or error}; {advice(error)}") from error
    try:
        with exclusive(part):
            with system_errors("write", path):
                signing_key, sealed = SigningKey.new(), SealedFiles(part, store_key)
                for file, secret in (("key", key), ("signing-key", signing_key)):
                    sealed.write(part / file, secret.hex().encode())
                (part / "base").mkdir()
                names = base_files(base)
                for file in names:
                    (part / "base" / file).parent.mkdir(exist_ok=True)
                    atomic_write(part / "base" / file, (local_folder(base) / file).read_bytes())
                atomic_write(part / "head.npy", head_bytes)
            meta = {"key": key.name, "public_key": signing_key.public, "deadline_days": deadline_days}
            with Ledger.create(part / "ledger.sqlite", meta) as ledger:
                atomic_write(part / "public.json", ledger.declaration + b"\n")
            body = {
                "schema": schema_dict(schema),
                "config": dataclasses.asdict(config),
                "base": base_hash,
                "probe": list(probe),
                "base_files": names,
                "head": hashlib.sha256(head_bytes).hexdigest(),
                "key": key.name,
                "store_key": store_key.name,
                "floor": dataclasses.asdict(floor or Floor()),
            }
            write_checked(part / "store.json", body)
            with StoreFolder(part, store_key) as folder:
                yield folder
            if kept:
                store_key.keep(kept)
            if anchor:
                Anchor(anchor).move(Anchor(part / "anchor").end())
            with system_errors("move the new store to", path):
                os.rename(part, path)
                sync_folder(path.parent)
    finally:
        if part.exists():
            sweep_beside(path)  # its key and anchor too


def write_slices(folder: StoreFolder, layout: Layout) -> tuple[dict[Cell, str], set[Holding]]:
    """Write the records of new slices; give what the ledger is to know of them."""
    digests, holdings = {}, set()
    for (shard, slice_), records in layout.slices.items():
        folder.records.put(shard, slice_, records)
        digests[shard, slice_] = digest_of(records)
        for names in records.subjects:
            holdings |= {Holding(subject_hash(folder.key, name), shard, slice_, "private") for name in names}
    return digests, holdings


def admit(folder: StoreFolder, layout: Layout, declared: Mapping[str, Iterable[str]]) -> None:
    """Write the records of a new store and enter slices and subjects in its ledger.

    Args:
        declared: subjects of each declared part ("public", "evaluation"): known, and not covered by deletion.
    """
    digests, holdings = write_slices(folder, layout)
    for part, subjects in declared.items():
        holdings |= {Holding(folder.hashed(subject), None, None, part) for subject in subjects}
    folder.ledger.ingest(digests, holdings)
