"""What is left of the deleted: by the books, and by a search of every file for given content. Loads no torch."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from s3t_ext.ledger.identity import record_key
from s3t_ext.ledger.log import Cell
from s3t_ext.store.crypt import HEAD, StoreKey, unseal
from s3t_ext.store.files import PART, StoreError, outside, read_bytes
from s3t_ext.store.records import Lost
from s3t_ext.store.sealed import looks_sealed
from s3t_ext.system.data.ingest import record_bytes
from s3t_ext.system.data.tables import read_table
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.lost import Losses
from s3t_ext.system.unlearn import deleted_in, writing

SHORTEST = 6  # bytes of a text that is searched for as it is: a shorter one is found by chance in a few gigabytes
_SLICE = re.compile(r"records/(\d+)-\d+")
RECORDS, NUMBERS, TEXT = "records", "numbers", "text"  # a file holds opened records; weights or sealed bytes; the rest


def residue(folder: StoreFolder, lost: Losses | None = None) -> dict[str, list[str]]:
    """List the dead nodes and the records of deleted subjects that are still in a store, or in it again.

    Args:
        lost: takes the slices that nobody can look into, since their file is damaged. A missing one holds nothing.

    Returns:
        Names of what is left, "nodes/<id>" or "records/<shard>-<slice>", by the request that they belong to; "" for
        nodes that no receipt names. Empty: nothing.

    Raises:
        Lost: a slice's file is damaged, and `lost` is not given.
    """
    names = {path.name.lstrip(".").partition(".")[0] for path in folder.nodes.folder.glob("*")}
    dead = {name for name in names if re.fullmatch("[0-9a-f]{64}", name)}
    dead -= set(folder.identities(folder.ledger.slices()).values())
    left: dict[str, list[str]] = defaultdict(list)
    unnamed = set(dead)
    kept: dict[Cell, Set[str]] = {}
    for request in folder.ledger.requests():
        if dead:
            receipt = folder.ledger.receipt(request.request_id) or {"shards": []}
            mine = dead.intersection({name for shard in receipt["shards"] for name in shard["dead"]})
            left[request.request_id] += [f"nodes/{name}" for name in sorted(mine)]
            unnamed -= mine
        for place in (place for subject in request.subjects for place in folder.ledger.find(subject)):
            if (cell := place.cell) is not None:
                if cell not in kept:
                    kept[cell] = _deleted_in(folder, cell, lost)
                if place.subject in kept[cell]:
                    left[request.request_id].append(f"records/{cell[0]}-{cell[1]}")
    left[""] = [f"nodes/{name}" for name in sorted(unnamed)]
    return {request: sorted(set(found)) for request, found in left.items() if found}


def _deleted_in(folder: StoreFolder, cell: Cell, lost: Losses | None) -> Set[str]:
    try:
        return deleted_in(folder, cell).keys()
    except Lost as error:
        if not error.missing:
            if lost is None:
                raise
            lost[cell] = error
        return set()


def remove(folder: StoreFolder, left: Mapping[str, Iterable[str]], told: Iterable[Cell] = ()) -> None:
    """Erase what `residue` listed.

    Args:
        told: lost slices of which no warning need say so.

    Raises:
        StoreError: it cannot be erased, or another process writes to the store.
    """
    with writing(folder) as known:
        known |= set(told)
        for name in sorted({name for names in left.values() for name in names}):
            kind, _, place = name.partition("/")
            if kind == "nodes":
                folder.nodes.erase(place)
            else:
                shard, slice_ = map(int, place.split("-"))
                folder.records.erase_subjects(shard, slice_, deleted_in(folder, (shard, slice_)).values())


def scan(folder: StoreFolder, file: Path | str) -> dict[str, Any]:
    """Search every file of a store, and what lies beside it, for content; sealed files as they are and opened.

    Args:
        file: a table under the store's schema (.csv, .tsv, .jsonl, .npz): its inputs as stored (numbers, tokens), its
            subjects (as given and normalised, in UTF-8 and as JSON escapes them) and its record keys; of any other file
            every line that is not empty, as text.

    Returns:
        hits: by file the number of times by what was found ("row 3 subject", "line 2"); files and bytes, searched;
        canaries, searched for; not_searched: those too short, or of one repeated byte, to be told from chance;
        unopened: sealed files that no key at hand opens under a name of this store; nobody has looked into them.

    Raises:
        ValueError: the table is wrong, or nothing in the file can be searched for.
    """
    folder.close()  # the books: who closes a file drops all locks that its process holds on it, those of SQLite too
    file = Path(file)
    wanted = list(_of_table(folder, file) if file.suffix in (".csv", ".tsv", ".jsonl", ".npz") else _of_lines(file))
    usable = [c for c in wanted if c.where and len(c.pattern) >= 3 and len(set(c.pattern)) > 1]
    labels = {c.label for c in usable}
    if not labels:
        raise ValueError(f"scan: expected content of at least {SHORTEST} bytes in {file}, got none")
    indices = {where: _Index([c for c in usable if where in c.where]) for where in (RECORDS, NUMBERS, TEXT)}
    store = folder.path.resolve()
    keys, sealed = list(_keys(store)), {path.resolve() for path in folder.files.all()}
    names = [folder.files.name(folder.path / path.relative_to(store)) for path in sorted(sealed)]
    shards = {*range(folder.config.shards), *(int(n[1]) for n in map(_SLICE.fullmatch, names) if n)}
    names += [f"records/{shard}-{k}" for shard in sorted(shards) for k in range(folder.config.slices)]
    hits: dict[str, Counter[str]] = defaultdict(Counter)
    unopened, count, size = [], 0, 0
    for path, inner in _files(store):
        data = read_bytes(path)
        count, size = count + 1, size + len(data)
        name = os.path.relpath(path, store)
        opened = _opened(path, data, keys, names, store.parent)
        if opened is None:
            shut = path in sealed or looks_sealed(data)
            hits[name] += indices[NUMBERS if shut or "base" in inner.parts or path.suffix == ".npy" else TEXT].find(
                data
            )
            unopened += [name] * shut
        else:
            under, content = opened
            hits[name] += indices[NUMBERS].find(data)
            hits[name] += indices[RECORDS if "records" in under.split("/") else NUMBERS].find(content)
    return {
        "hits": {name: dict(sorted(found.items())) for name, found in sorted(hits.items()) if found},
        "files": count,
        "bytes": size,
        "canaries": len(labels),
        "not_searched": sorted({c.label for c in wanted} - labels),
        "unopened": unopened,
    }


class Canary(NamedTuple):
    """Bytes to search for; a `word` is not part of a longer one."""

    label: str
    pattern: bytes
    where: tuple[str, ...]
    word: bool = False


def _of_table(folder: StoreFolder, file: Path) -> Iterator[Canary]:
    everywhere = (RECORDS, NUMBERS, TEXT)
    table = read_table(file, folder.schema, folder.base)
    given = read_table(file, replace(folder.schema, normalise="exact"), folder.base)
    equals: Counter[tuple] = Counter()
    for i, names in enumerate(table.subjects):
        value = table.inputs[i]
        content = record_bytes(value, table.labels[i])
        key = record_key(folder.key, names, content, equals[names, content])
        equals[names, content] += 1
        kept = value[value >= 0] if folder.schema.is_text else value
        yield Canary(f"row {i + 1} input", kept.tobytes(), everywhere)
        yield Canary(f"row {i + 1} key", key, everywhere)
        yield Canary(f"row {i + 1} key", key.hex().encode(), everywhere)
        for text in {*names, *given.subjects[i]}:
            for spelt in _spellings(text):
                short = len(spelt) < SHORTEST
                yield Canary(f"row {i + 1} subject", b'"' + spelt + b'"', (RECORDS, TEXT) if short else (RECORDS,))
                if not short:
                    yield Canary(f"row {i + 1} subject", spelt, (NUMBERS, TEXT), word=True)


def _of_lines(file: Path) -> Iterator[Canary]:
    try:
        lines = read_bytes(file).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"scan: expected a table or lines of UTF-8 text, got {file.name}: {error}") from None
    for number, line in enumerate(map(str.strip, lines), 1):
        for spelt in _spellings(line) if line else ():
            where = (RECORDS, NUMBERS, TEXT) if len(spelt) >= SHORTEST else ()
            yield Canary(f"line {number}", spelt, where, word=True)


def _spellings(text: str) -> set[bytes]:
    return {text.encode(), json.dumps(text)[1:-1].encode()}


class _Index:
    """Find any of many patterns in one pass: by eight bytes of each, or four, at the place where they differ most."""

    def __init__(self, canaries: Iterable[Canary]) -> None:
        self.canaries: dict[int, dict[bytes, list[tuple[Canary, int]]]] = {8: {}, 4: {}, 3: {}}
        for canary in canaries:
            width = next(w for w in (8, 4, 3) if len(canary.pattern) >= w)
            windows = [canary.pattern[i : i + width] for i in range(len(canary.pattern) - width + 1)]
            at = max(range(len(windows)), key=lambda i: len(set(windows[i])))
            self.canaries[width].setdefault(windows[at], []).append((canary, at))

    def find(self, data: bytes) -> Counter[str]:
        """Count the patterns in `data`, by label."""
        found: Counter[str] = Counter()
        for width, anchors in self.canaries.items():
            for start in _starts(data, width, sorted(anchors)) if anchors else ():
                for canary, at in anchors[data[start : start + width]]:
                    first, last = start - at, start - at + len(canary.pattern)
                    if first >= 0 and data[first:last] == canary.pattern:
                        found[canary.label] += not (canary.word and _inside(data, first, last))
        return +found


def _starts(data: bytes, width: int, anchors: list[bytes]) -> Iterator[int]:
    if width == 3:
        yield from (match.start() for a in anchors for match in re.finditer(re.escape(a), data))
        return
    wanted = np.frombuffer(b"".join(anchors), f"<u{width}")  # (anchors,)
    known = np.zeros(1 << 20, bool)  # by a hash of the word: it lets few others pass, at memory's speed
    known[_hash(wanted)] = True
    for shift in range(min(width, len(data))):
        words = np.frombuffer(data, f"<u{width}", (len(data) - shift) // width, shift)  # (len // width,)
        for start in range(0, len(words), 1 << 20):
            block = words[start : start + (1 << 20)]
            at = np.flatnonzero(known[_hash(block)])
            yield from ((at[np.isin(block[at], wanted)] + start) * width + shift).tolist()


def _hash(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(44)  # 20 bits


def _inside(data: bytes, first: int, last: int) -> bool:
    """Tell whether a letter or digit stands before or after."""
    return any(byte.isalnum() or byte >= b"\x80" for byte in (data[max(0, first - 1) : first], data[last : last + 1]))


# Files


def _files(store: Path) -> Iterator[tuple[Path, Path]]:
    """List the files of a store, those that lie outside its folder, and what killed runs left beside it.

    Each with its place in the folder that was looked through.
    """
    name = glob.escape(store.name)
    beside = [path for kind in ("key", "anchor") for path in outside(store, kind).parent.glob(f"{name}.{kind}*")]
    folders = {store.parent, *(path.parent for path in beside)}
    left = [path for folder in folders for path in folder.iterdir() if path.name.startswith(f".{store.name}.")]
    for path in sorted({store, *beside, *left}):
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from ((p, p.relative_to(path)) for p in found if p.is_file())


def _keys(store: Path) -> Iterator[StoreKey]:
    """Give every store key at hand: of the environment, of the key file, of an unfinished rotation."""
    with suppress(StoreError):
        yield StoreKey.from_hex(os.environ.get("S3T_STORE_KEY", ""), "S3T_STORE_KEY")
    for kind in ("key", "key.new"):
        with suppress(StoreError):
            yield StoreKey.load(outside(store, kind))


def _opened(
    path: Path, data: bytes, keys: list[StoreKey], names: list[str], outermost: Path
) -> tuple[str, bytes] | None:
    """Open a sealed file with any key and under any name that its place gives, or that the store has: a copy.

    Returns:
        Name and content; None: it is no sealed file, or is for another key, or has another name.
    """
    if len(data) < HEAD or not any(bytes.fromhex(key.name) in data[:HEAD] for key in keys):
        return None
    written = re.fullmatch(rf"\.(.+)\.[0-9a-f]{{8}}{re.escape(PART)}", path.name)
    named = path.with_name(written[1]) if written else path
    roots = [root for root in named.parents if root == outermost or outermost in root.parents] or named.parents
    for name in [*(named.relative_to(root).with_suffix("").as_posix() for root in roots), *names]:
        for key in keys:
            with suppress(ValueError):
                return name, unseal(name, data, key)
    return None
