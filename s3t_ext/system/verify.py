"""Verify a store by the front door: retrain from the table less the deleted subjects, elsewhere, and compare bits."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from s3t_ext.ledger import Request
from s3t_ext.ledger.identity import canonical_json, framed
from s3t_ext.ledger.log import Cell
from s3t_ext.plan import Node
from s3t_ext.store.crypt import StoreKey
from s3t_ext.store.files import StoreError, read_bytes
from s3t_ext.store.spool import Spool
from s3t_ext.store.tensors import weights_hash
from s3t_ext.system.creation import admit, creating, write_slices
from s3t_ext.system.data.tables import Table, read_chunks
from s3t_ext.system.evidence.origin import Rows, check_origin, rows_of
from s3t_ext.system.evidence.residue import residue
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.growth import lay_out_generation
from s3t_ext.system.lost import held, losses
from s3t_ext.system.scratch import answer, hand_over, in_fresh_process, scratch_beside
from s3t_ext.system.training.provenance import differences, provenance
from s3t_ext.system.wording import counted

ROWS = "changed_rows", "missing_rows", "other_rows"
Tables = Table | Path | str | Sequence[Table | Path | str]


def verify(
    path: Path | str,
    table: Tables,
    nodes: str | int = "all",
    *,
    seed: int = 0,
    certify: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Retrain nodes in a fresh process and an empty store, from the raw table less the deleted subjects.

    The fresh store gets the key, the declarations, the base and the head of the store, and its list of invalid slices;
    it gets no record, digest, salt or weight of it.

    Args:
        table: or a sequence of tables, one of each generation, in order.
        nodes: ``"all"`` live nodes in the store, or how many to draw by ``seed``: deep ones, in turn of each shard that
            requests have hit, then of the others. Those above them are retrained on the way, and compared too.
        certify: where every compared node is equal, and there is one, enter in the ledger that requests erased before
            are certified, with what was compared as evidence: those with a node compared in each shard that held
            their subjects.

    Returns:
        nodes (compared), depths and shards (covered), mismatched (count), differing (nodes that differ),
        changed_rows, missing_rows, other_rows (in which the tables differ from what the store holds, see
        ``check_origin``: a reason for differing nodes that is not the store's), incomparable (count:
        provenance differs; ``reason`` says how), live (nodes in the store), provenance (SHA-256
        of this machine's); for ``certify`` also certified (ids of the requests) and
        uncertified (by id: why).

    Raises:
        ValueError, StoreError: bad table or store, a table that is another generation's, or ``certify`` while
            a request is not erased, or leaves something; RuntimeError: the fresh process failed.
    """
    path = Path(path).absolute()
    with scratch_beside(path) as scratch:
        with StoreFolder(path) as folder:
            schema, (erased, stuck) = folder.schema, _erased(folder) if certify else ([], {})
        given = [hand_over(table, schema, path / "base") for table in listed(table)]
        task = {
            "path": str(path),
            "tables": given,
            "nodes": str(nodes),
            "seed": seed,
            "progress": progress,
            "scratch": str(scratch / scratch.name),  # a name that no other store has
        }
        evidence = {
            "sample": str(nodes),
            "seed": seed,
            "tables": [_sha256(table) for table in given] if certify else [],
        }
        result = in_fresh_process("s3t_ext.system.verify", task, scratch)
    if not certify:
        return result
    told = _certify(path, erased, result, evidence)
    return {**result, **told, "uncertified": {**told["uncertified"], **stuck}}


def _sha256(table: Table | str) -> str:
    """Hash a table: its file, or each of its folder; where it is in memory, subjects, inputs and labels."""
    if isinstance(table, str):
        if not Path(table).is_dir():
            return hashlib.sha256(read_bytes(table)).hexdigest()
        digest = hashlib.sha256()
        for path in sorted(path for path in Path(table).rglob("*") if path.is_file()):
            digest.update(framed(path.relative_to(table).as_posix().encode(), read_bytes(path)))
        return digest.hexdigest()
    subjects = canonical_json(list(map(list, table.subjects)))
    return hashlib.sha256(subjects + table.inputs.tobytes() + table.labels.tobytes()).hexdigest()


def _erased(folder: StoreFolder) -> tuple[list[Request], dict[str, str]]:
    """List the requests to certify, before their absence is looked at, and by id why others cannot be."""
    requests, lost = folder.ledger.requests(), losses(folder)
    waiting = {r.request_id: held(folder, r) & lost.keys() for r in requests if r.state == "applied"}
    pending = [request for request, cells in waiting.items() if not cells]
    if pending:
        raise ValueError(f"certify: expected every request to be erased, got pending ones: {', '.join(pending)[:80]}")
    left = residue(folder, lost)
    if left:
        raise ValueError(f"certify: expected nothing to be left of any request, got {left}; see `s3t erase`")
    stuck = {request: f"not erased: {_slices(cells)} lost" for request, cells in waiting.items()}
    erased = []
    for request in (r for r in requests if r.state == "erased"):
        damaged = {cell for cell in held(folder, request) & lost.keys() if not lost[cell].missing}
        unseen = {(shard, slice_) for shard, slice_, _ in request.unseen}
        if damaged:
            stuck[request.request_id] = f"nobody can look into {_slices(damaged)} lost"
        elif unseen:
            stuck[request.request_id] = f"nobody looked into {_slices(unseen)} given up, until it is back and healed"
        else:
            erased.append(request)
    return erased, stuck


def _slices(cells: Collection[Cell]) -> str:
    names = [f"{shard}-{slice_}" for shard, slice_ in sorted(cells)]
    return f"slice {names[0]}, which is" if len(names) == 1 else f"slices {', '.join(names)}, which are"


def _certify(
    path: Path, erased: list[Request], result: Mapping[str, Any], evidence: Mapping[str, Any]
) -> dict[str, Any]:
    told = {name: result[name] for name in ("nodes", "live", "shards", "incomparable", *ROWS, "provenance")}
    with StoreFolder(path) as folder:
        why = {request.seq: _uncertified(folder, request, result) for request in erased}
        sound = [request for request in erased if not why[request.seq]]
        if sound:
            folder.ledger.certify([request.seq for request in sound], {**evidence, **told})
    return {
        "certified": [request.request_id for request in sound],
        "uncertified": {request.request_id: why[request.seq] for request in erased if why[request.seq]},
    }


def _uncertified(folder: StoreFolder, request: Request, result: Mapping[str, Any]) -> str:
    """Tell why what was compared says nothing of a request, or nothing good; empty: it certifies it."""
    if result["mismatched"]:
        return f"{counted(result['mismatched'], 'node')} not equal"
    if not result["nodes"]:
        return "no node was compared"
    places = [place for subject in request.subjects for place in folder.ledger.find(subject)]
    held = {place.shard for place in places if place.shard is not None}
    missed = held - set(result["shards"])
    dead = missed - {shard for shard, _ in folder.trained(folder.ledger.slices())}
    if dead:
        return f"no live node is left in shards {sorted(dead)}; `s3t heal`, then verify again"
    return f"no node of shards {sorted(missed)} was compared" if missed else ""


def listed(tables: Tables) -> list[Table | Path | str]:
    """Give tables as a list, of one too."""
    return [tables] if isinstance(tables, (Table, Path, str)) else list(tables)


def compare(
    path: str, tables: Sequence[Table | str], nodes: str, seed: int, progress: bool, scratch: str
) -> dict[str, Any]:
    """Do the work of ``verify`` in this process, expected to be a fresh one."""
    from s3t_ext.system.training.train import Trainer

    with StoreFolder(path) as folder:
        slices = folder.ledger.slices()
        live = folder.trained(slices)
        chosen = _choose(sorted(live), nodes, seed, _hit(folder))
        manifests = {node: folder.nodes.manifest(live[node]) for node in chosen}
        here = provenance(folder.config.precision)
        apart = {node: differences(m["provenance"], here) for node, m in manifests.items()}
        comparable = [node for node in chosen if not apart[node]]
        config = folder.config
        declared = folder.schema, config, folder.key, folder.base, folder.base_hash, folder.head()
        store_key = StoreKey.new()  # in memory alone: what a kill leaves of the fresh store cannot be read
        with creating(Path(scratch), *declared, store_key=store_key, probe=folder.probe) as fresh:
            rows = retell(folder, fresh, tables)
        with StoreFolder(scratch, store_key) as fresh:
            ids = fresh.identities(fresh.ledger.slices())
            wanted = {(s, p[:d]) for s, p in comparable for d in range(1, len(p) + 1)}
            Trainer(fresh).train({node: ids[node] for node in ids if node in wanted}, progress)
            retrained = {node: fresh.nodes.manifest(ids[node])["weights"] for node in comparable}
        stored = {node: stored_weights(folder, live[node]) for node in comparable}
        still = folder.identities(folder.ledger.slices())  # a deletion meanwhile erases nodes: no difference
        comparable = [node for node in comparable if still.get(node) == live[node]]  # healed: another one there
        differing = [
            {"shard": node[0], "path": list(node[1]), "node": live[node]}
            for node in comparable
            if stored[node] != retrained[node]
        ]
    reasons = sorted({reason for found in apart.values() for reason in found})
    return {
        "nodes": len(comparable),
        "live": len(live),
        "depths": sorted({len(p) for _, p in comparable}),
        "shards": sorted({s for s, _ in comparable}),
        "mismatched": len(differing),
        "differing": differing,
        **rows,
        "incomparable": sum(map(bool, apart.values())),
        "reason": "; ".join(reasons),
        "provenance": hashlib.sha256(canonical_json(here)).hexdigest(),
    }


def retell(folder: StoreFolder, fresh: StoreFolder, tables: Sequence[Table | str]) -> dict[str, int]:
    """Enter the tables of a store's generations in a fresh one, in order, less who was deleted from each.

    Returns:
        As ``check_origin``.

    Raises:
        ValueError: a table is not that of its generation.
    """
    generations = folder.ledger.generations
    if len(tables) != len(generations):
        raise ValueError(
            f"table: expected one for each of the store's {counted(len(generations), 'generation')}, in order, got "
            f"{len(tables)}"
        )
    given: list[Rows] = [Counter() for _ in generations]
    for generation, table, rows in zip(generations, tables, given, strict=True):
        with Spool(fresh.path) as spool:
            layout = lay_out_generation(folder, _of_the_store(folder, table, rows), generation, spool=spool)
            if generation.number:
                fresh.ledger.grow(*write_slices(fresh, layout))
            else:
                admit(fresh, layout, {})
    return check_origin(folder, given)


def _of_the_store(folder: StoreFolder, table: Table | str, rows: Rows) -> Iterator[Table]:
    """Read a table in chunks, which may hold nobody whom the store does not; count their rows."""
    for chunk in read_chunks(table, folder.schema, folder.base):
        check_subjects(folder, chunk)
        rows.update(rows_of(chunk.subjects, chunk.inputs, chunk.labels))
        yield chunk


def check_subjects(folder: StoreFolder, records: Table) -> None:
    """Refuse another table than the store's: a difference would then say nothing about the store."""
    dropped = folder.ledger.deleted()
    unknown = set()
    for people in records.subjects:
        names = {folder.hashed(name): name for name in people}
        if dropped.isdisjoint(names):  # with somebody deleted, a row was dropped, and others on it may be held nowhere
            unknown |= {name for hashed, name in names.items() if not folder.ledger.find(hashed)}
    for name in sorted(unknown):
        raise ValueError(f"table: expected the store's own, got one with {name!r}, whom the store does not hold")


def stored_weights(folder: StoreFolder, name: str) -> str:
    try:
        return weights_hash(folder.nodes.get(name)[1])
    except StoreError:
        return "damaged"


def _hit(folder: StoreFolder) -> set[int]:
    """Name the shards that requests have hit."""
    asked = {subject for request in folder.ledger.requests() for subject in request.subjects}
    return {place.shard for subject in asked for place in folder.ledger.find(subject) if place.shard is not None}


def _choose(live: list[Node], nodes: str, seed: int, first: Collection[int] = ()) -> list[Node]:
    """Draw nodes: from every shard in turn one of its deepest, with the chain above it, which is retrained anyway.

    Args:
        first: shards whose turn comes before that of the others.
    """
    if nodes == "all":
        return live
    if not (nodes.isascii() and nodes.isdecimal()) or int(nodes) < 1:
        raise ValueError(f"nodes: expected 'all' or a number of at least 1, got {nodes!r}")
    rng = random.Random(seed)
    drawn = sorted(live, key=lambda node: (len(node[1]), rng.random()))  # deepest last
    shards = sorted({shard for shard, _ in live}, key=lambda shard: (shard not in first, rng.random()))
    chosen: set[Node] = set()
    left = int(nodes)
    while left and len(chosen) < len(live):
        for shard in shards:
            more = [path for s, path in drawn if s == shard and (s, path) not in chosen]
            if more and left:
                chosen |= {(shard, more[-1][:depth]) for depth in range(1, len(more[-1]) + 1)}
                left -= 1
    return sorted(chosen)


if __name__ == "__main__":
    answer(compare)
