"""Make a store from a table, or go on where a killed run stopped."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from s3t_ext.ledger.identity import Key
from s3t_ext.models.base import BaseModel
from s3t_ext.models.folder import load_model, model_hash
from s3t_ext.models.trial import probe
from s3t_ext.store.spool import Spool
from s3t_ext.system.config import Config, check_combine
from s3t_ext.system.creation import admit, check_new, creating
from s3t_ext.system.data.ingest import Layout, lay_out
from s3t_ext.system.data.schema import Schema
from s3t_ext.system.data.tables import Table, read_chunks
from s3t_ext.system.folder import DEADLINE_DAYS, Floor, StoreFolder, announce, promise
from s3t_ext.system.growth import find_generation, last_request
from s3t_ext.system.growth import grow as open_generation
from s3t_ext.system.network import adapt_base, declare_head
from s3t_ext.system.settings import Settings
from s3t_ext.system.training.executor import trainer_for
from s3t_ext.system.training.train import Trainer
from s3t_ext.system.unlearn import erase, writing


def fit(
    path: Path | str,
    table: Table | Path | str,
    schema: Schema | None = None,
    base: Path | str | None = None,
    config: Config | None = None,
    *,
    key: bytes | None = None,
    declared: Mapping[str, Iterable[str]] | None = None,
    deadline_days: int | None = None,
    settings: Settings | None = None,
    progress: bool = True,
    grow: bool = False,
    grow_shards: int | None = None,
    readmit: Sequence[str] = (),
    floor: Floor | None = None,
) -> dict:
    """Make a store from a table and train every node of its plan; or go on where a killed run stopped.

    A store that is there keeps what it was made with: of schema, base, configuration and deadline may be left out what
    a new one needs, and what is given must be the same.

    Args:
        path: of the store; a new folder, or one that ``fit`` made from the same table and declarations.
        table: records in memory, or a file that ``read_table`` reads under ``schema``.
        base: folder of the frozen base model.
        key: 32 bytes that all streams and placements derive from; None: drawn at random.
        declared: subjects of declared parts, by part: they are known to the ledger and not covered by deletion.
        deadline_days: within which a request is to be erased; receipts name the day. None, of a new store: 30.
        settings: how training uses machines; it changes no bit.
        grow: where the store exists, take a table of other records: they open new shards, a generation of their own.
        grow_shards: how many; None: as many as the store was declared with.
        readmit: deleted subjects whose records in the new table are taken all the same; a new request counts for them.
        floor: the least depth that is promised, which ``status`` holds the store against; of a store that is there it
            takes the place of the one that was promised.

    Returns:
        A report: nodes trained and found, generations, records, dropped (records of deleted subjects), seconds, and how
        training used the machine.

    Raises:
        ValueError: the table, schema or configuration is wrong, or differs from those of the existing store, or memory
            does not hold one node: before anything is written.
        StoreError: the folder cannot be read or written, or another process writes to it.
    """
    path, settings = Path(path), settings or Settings()
    there = (path / "store.json").exists()
    days = DEADLINE_DAYS if deadline_days is None else deadline_days
    if isinstance(days, bool) or not isinstance(days, int) or not 1 <= days <= 36500:
        raise ValueError(f"deadline_days: expected a whole number of 1 to 36500, got {deadline_days!r}")
    for name, given in (("grow_shards", grow_shards), ("readmit", readmit or None)):
        if given is not None and not grow:
            raise ValueError(f"{name}: expected it beside grow only, got {given!r}")
    if grow_shards is not None and (type(grow_shards) is not int or grow_shards < 1):
        raise ValueError(f"grow_shards: expected an integer of at least 1, got {grow_shards!r}")
    if there:
        with StoreFolder(path) as folder, writing(folder):
            asked = last_request(folder)
            erase(folder)
            _check_same(folder, schema, base, config, key, deadline_days)
            _check_declared(folder, declared or {})
            read = partial(read_chunks, table, folder.schema, folder.base)
            layout, others = find_generation(folder, read, grow)
            _check_opened(folder, layout, grow_shards, readmit)
            if layout is None and grow:
                _check_memory(folder, settings)
                layout = open_generation(folder, read, grow_shards or folder.config.shards, readmit, asked)
            if layout is None:
                raise ValueError(
                    f"table: expected the records that the store was made from, got {others}; new records open new "
                    "shards: --grow does that; use a new store for another table"
                )
            if floor is not None:
                promise(folder, floor)
        return _train_all(path, layout, settings, progress)
    check_new(path, grow)
    for name, needed in (("schema", schema), ("base", base)):
        if needed is None:
            raise ValueError(f"{name}: expected it to be given for a new store, got none")
    assert schema
    assert base
    config = config or Config()
    check_combine(config.combine, schema)
    model = load_model(Path(base), schema.task == "causal")
    drawn = Key(key) if key is not None else Key.new()
    _check_model(model, schema, base)
    head = declare_head(drawn, schema, config, model)
    base_hash, numbers = model_hash(model), probe(model)
    adapt_base(model, config, 1)
    made = creating(path, schema, config, drawn, Path(base), base_hash, head, days, None, floor, numbers)
    with made as folder, Spool(folder.path) as spool:
        _check_memory(folder, settings)
        chunks = read_chunks(table, schema, folder.base, model.vocabulary)
        layout = lay_out(chunks, drawn, config.shards, config.slices, spool=spool)
        layout.check()
        admit(folder, layout, declared or {})
    return _train_all(path, layout, settings, progress)


def _check_model(model: BaseModel, schema: Schema, base: Path | str) -> None:
    if schema.is_text != bool(model.vocabulary):
        kinds = ("max_length", "texts"), ("shape", "numbers")
        (wanted, takes), (got, other) = kinds if model.vocabulary else kinds[::-1]
        raise ValueError(
            f"schema.{wanted}: expected it to be declared, since the base model in {base} takes {takes}, got {got!r}; "
            f"change the schema, or give a base model of {other}"
        )
    if model.shape is not None and model.shape != schema.shape:
        raise ValueError(
            f"schema.shape: expected {list(model.shape)}, what the base model in {base} takes, got {list(schema.shape)}"
        )
    if 0 < model.positions < schema.max_length:
        raise ValueError(f"schema.max_length: expected at most the model's {model.positions}, got {schema.max_length}")


def _check_memory(folder: StoreFolder, settings: Settings) -> None:
    """Refuse too little memory for one node, before records are written; a cluster's workers look at their own."""
    if settings.executor == "local":
        Trainer(folder, settings).budget(range(1, folder.tree.depth + 1))


def _check_same(
    folder: StoreFolder,
    schema: Schema | None,
    base: Path | str | None,
    config: Config | None,
    key: bytes | None,
    deadline_days: int | None,
) -> None:
    """Hold what is declared, as far as it is, against what an existing store was made with."""
    days, causal = folder.ledger.meta["deadline_days"], folder.schema.task == "causal"
    ours, theirs = (
        {
            **_fields("schema", schemas),
            **_fields("configuration", configs),
            "deadline_days": within,
            "base model": base_hash,
        }
        for schemas, configs, within, base_hash in (
            (folder.schema, folder.config, days, folder.base_hash),
            (
                schema or folder.schema,
                config or folder.config,
                days if deadline_days is None else deadline_days,
                folder.base_hash if base is None else model_hash(load_model(Path(base), causal)),
            ),
        )
    )
    if changed := [f"{name}: {ours[name]!r}, got {theirs[name]!r}" for name in ours if ours[name] != theirs[name]]:
        raise ValueError(
            f"expected what {folder.path} was made with, {'; '.join(changed)}; use a new store for another"
        )
    if key is not None and Key(key) != folder.key:
        raise ValueError("key: expected the key of the existing store; leave it out to go on with it")


def _fields(what: str, declared: Any) -> dict[str, Any]:
    return {f"{what}.{field.name}": getattr(declared, field.name) for field in dataclasses.fields(declared)}


def _check_opened(folder: StoreFolder, layout: Layout | None, shards: int | None, readmit: Sequence[str]) -> None:
    """Refuse to say nothing where a table opened its shards before: others, or without who is to be re-admitted now."""
    if layout is None:
        return
    opened = {shard for shard, _ in layout.counts}
    if shards not in (None, len(opened)):
        raise ValueError(
            f"grow_shards: expected {len(opened)}, as many as this table opened before, or a table of new records, got "
            f"{shards}"
        )
    first = min(opened)
    gone = folder.ledger.gone(first)
    if out := [name for name in readmit if folder.hashed(name) in gone]:
        raise ValueError(
            f"readmit: expected people of new records, got {', '.join(map(repr, out))}: this table opened its shards "
            f"(from {first} on) before, without them; give their records alone, as a table of its own"
        )


def _check_declared(folder: StoreFolder, declared: Mapping[str, Iterable[str]]) -> None:
    for part, subjects in declared.items():
        there = [any(h.part == part for h in folder.ledger.find(folder.hashed(subject))) for subject in subjects]
        if lacking := there.count(False):
            raise ValueError(
                f"declared: expected people declared as {part!r} when the store was made, got {lacking} of "
                f"{len(there)} who were not; use a new store"
            )


def _train_all(path: Path, layout: Layout, settings: Settings, progress: bool) -> dict:
    start = time.perf_counter()
    with StoreFolder(path) as folder:
        with writing(folder):
            with trainer_for(folder, settings) as trainer:
                trained = trainer.train(folder.identities(folder.ledger.slices()), progress)
            announce(folder)
        live = folder.trained(folder.ledger.slices())
        records = sum(count for cell, count in layout.counts.items() if cell not in folder.ledger.given_up())
        generations = len(folder.ledger.generations)
    return {
        "store": str(path),
        "nodes": len(live),
        "trained": trained,
        "generations": generations,
        "dropped": layout.dropped,
        "records": records,
        "seconds": round(time.perf_counter() - start, 3),
        "training": trainer.notes,
    }
