"""Methods that are a store of the product: trained by ``fit``, served, asked to forget, and looked into."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch

from bench.datasets import Data
from bench.unlearning_baselines import Predictor, Row, rows_of, score, without
from s3t_ext import Config, Service, StageTree, delete, fit
from s3t_ext.ledger.identity import Key
from s3t_ext.ledger.partition import place
from s3t_ext.models.batches import by_length
from s3t_ext.plan import Node
from s3t_ext.system.data.tables import Table
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.heal import heal
from s3t_ext.system.serve import Refused
from s3t_ext.system.unlearn import erase_or_warn

STRATEGIES = ("sisa", "rotation", "subsets")  # `rotation` with as many sequences as slices
AFTER = (10, 20, 40)  # requests
REQUESTS = 400  # after so many a stream is given up
DELETED = 40  # people deleted together, from one slice of every shard
HEALED = 3  # people
KEPT = 1000  # records of others that are scored beside theirs


class Cell(NamedTuple):
    """One run: what is made in ``folder`` is taken up again by a later run."""

    data: Data
    method: str
    seed: int
    base: Path
    folder: Path
    key: Key


def config_of(data: Data, method: str) -> Config:
    """Give the configuration of a method of this file."""
    name, _, placement = method.partition("-")
    if method in ("one-slice", "unsharded"):
        base = data.configs["stack"]
        shards = base.shards * base.slices if method == "one-slice" else 1
        steps = base.steps if isinstance(base.steps, tuple) else (base.steps,) * base.slices
        longest = steps[0] if method == "one-slice" else base.shards * sum(steps)  # as often over each record
        return replace(base, shards=shards, slices=1, strategy="sisa", budget=None, steps=longest)
    usual = data.configs[placement]
    return replace(usual, strategy=name, budget=usual.slices if name == "rotation" else None)


def run(cell: Cell) -> Iterator[Row]:
    """Train a store, then measure it: by depth, under requests, on deleted and kept records, healed, its adapters."""
    config = config_of(cell.data, cell.method)
    yield from trained(cell, config)
    whole = cell.folder / "whole" / "store"
    yield from by_depth(whole, config, cell.data)
    if cell.method != "unsharded":
        yield from requests(fresh(cell), cell)
        yield from memory(fresh(cell), cell, config)
        yield from healing(fresh(cell), cell, config)
    if config.slices > 1:
        yield from similarity(whole)
    shutil.rmtree(cell.folder / "now", ignore_errors=True)


def trained(cell: Cell, config: Config) -> Iterator[Row]:
    """Fit the store, or go on; a run that went on does not tell how long all of it took."""
    report, store = cell.folder / "fit.json", cell.folder / "whole" / "store"
    if not report.exists():
        again, start = (store / "store.json").exists(), time.process_time()
        key = bytes.fromhex(cell.key.hex())
        done = fit(store, cell.data.private, cell.data.schema, cell.base, config, key=key, progress=False)
        report.write_text(
            json.dumps({"nodes": done["nodes"], "seconds": None if again else time.process_time() - start})
        )
    told = json.loads(report.read_text())
    if told["seconds"] is not None:
        yield {"metric": "training", "value": round(told["seconds"], 3), "unit": "s of processors"}
    yield {"metric": "nodes", "value": told["nodes"], "unit": "nodes"}
    yield {"metric": "slice passes", "value": config.shards * config.tree().slice_passes, "unit": "slice-passes"}
    for name in ("nodes", "base"):
        files = [path for path in (store / name).rglob("*") if path.is_file()]
        yield {"metric": "stored", "x": name, "value": sum(path.stat().st_size for path in files), "unit": "bytes"}


def fresh(cell: Cell) -> Path:
    """Copy the trained store, with the two small files that lie beside it, to one that may forget."""
    shutil.rmtree(cell.folder / "now", ignore_errors=True)
    shutil.copytree(cell.folder / "whole", cell.folder / "now")
    return cell.folder / "now" / "store"


def by_depth(store: Path, config: Config, data: Data) -> Iterator[Row]:
    """Score the ensemble with every shard at the same depth, by depth."""
    nodes = config.tree().nodes
    for depth in range(1, config.tree().depth + 1):
        tree = StageTree.from_sequences(config.slices, [path for path in nodes if len(path) <= depth])
        with Service(store, tree=tree) as service:
            assert service.depths == (depth,) * config.shards
            yield {"metric": "score at depth", "x": depth, **score(answers(service), data.schema, data.test)}


def people_in_turn(data: Data, seed: int) -> list[str]:
    """Draw who asks to be forgotten, in which order: the same for all methods."""
    people = sorted({name for names in data.private.subjects for name in names})
    random.Random(f"requests {seed}").shuffle(people)
    return people


def requests(store: Path, cell: Cell) -> Iterator[Row]:
    """Delete people one by one until every shard is dead; score whenever other nodes serve.

    Now and then all maximal live nodes are scored too, in place of the deepest one of each shard.
    """
    acknowledged, erased, used, dead = [], [], None, 0
    with Service(store) as service:
        shards = service.config.shards
        stops = {"first": 1, "half": (shards + 1) // 2, "last": shards}
        for count, person in enumerate(["", *people_in_turn(cell.data, cell.seed)[:REQUESTS]]):
            if person:
                start = time.perf_counter()
                service.acknowledge([person])
                acknowledged.append(1e3 * (time.perf_counter() - start))
                erase_or_warn(service.folder)
                erased.append(1e3 * (time.perf_counter() - start))
            depths = service.depths
            for name, number in stops.items():
                if dead < number <= depths.count(0):
                    yield {"metric": "served", "x": name, "value": count, "unit": "requests"}
            dead = depths.count(0)
            try:
                serving = service.predict(cell.data.test.inputs[:1]).nodes
            except Refused:
                break
            if serving != used:
                used = serving
                yield {"metric": "score after", "x": count, **score(answers(service), cell.data.schema, cell.data.test)}
                yield {"metric": "depth after", "x": count, "value": sum(depths) / shards, "unit": "stages"}
            if count in (0, *AFTER):
                with Service(store, ensemble="maximal") as all_of_them:
                    whole = score(answers(all_of_them), cell.data.schema, cell.data.test)
                yield {"metric": "maximal after", "x": count, **whole}
    for name, times in (("acknowledged", acknowledged), ("erased", erased)):
        for quantile in (50, 99):
            value = round(float(np.percentile(times, quantile)), 3)
            yield {"metric": name, "x": f"p{quantile}", "value": value, "unit": "ms"}


def deleted_people(data: Data, seed: int, key: Key, shards: int, slices: int) -> set[str]:
    """Draw people to delete together from one slice of every shard, so that every shard goes on serving."""
    rng = random.Random(f"deleted {seed}")
    cells = {(shard, rng.randrange(slices)) for shard in range(shards)}
    people = people_in_turn(data, seed)
    return set([name for name in people if place(key, name, shards, slices) in cells][:DELETED])


def parts_of_memory(data: Data, seed: int, gone: set[str]) -> dict[str, Table]:
    """Give the records to compare: of the deleted, of others, and the test part."""
    kept = without(data.private, gone)
    rows = random.Random(f"kept {seed}").sample(range(len(kept)), min(KEPT, len(kept)))
    deleted = [i for i, names in enumerate(data.private.subjects) if not gone.isdisjoint(names)]
    return {"deleted": rows_of(data.private, deleted), "kept": rows_of(kept, rows), "test": data.test}


def memory(store: Path, cell: Cell, config: Config) -> Iterator[Row]:
    """Score deleted, kept and test records before and after people are deleted from one slice of every shard.

    After it there may be nothing that serves: SISA is dead where these are the first slices.
    """
    usual = cell.data.configs["stack"]  # the same people for all methods
    gone = deleted_people(cell.data, cell.seed, cell.key, usual.shards, usual.slices)
    parts = parts_of_memory(cell.data, cell.seed, gone)
    with Service(store) as service:
        for when in ("before", "after"):
            if when == "after":
                service.delete(sorted(gone))
                same = (config.shards, config.slices) == (usual.shards, usual.slices)
                assert not same or len(service.folder.ledger.dirty()) <= usual.shards, "of one slice a shard"
                if not any(service.depths):
                    return
            for part, table in parts.items():
                yield {"metric": f"score {when}", "x": part, **score(answers(service), cell.data.schema, table)}


def healing(store: Path, cell: Cell, config: Config) -> Iterator[Row]:
    """Forget people one by one and retrain at once all that is lost: seconds and slice-passes of each; then score."""
    for count, person in enumerate(people_in_turn(cell.data, cell.seed)[:HEALED], 1):
        delete(store, [person])
        start = time.process_time()
        report = heal(store, progress=False)
        yield {
            "metric": "healed",
            "x": count,
            "value": round(time.process_time() - start, 3),
            "unit": "s of processors",
        }
        yield {"metric": "healed passes", "x": count, "value": report["slice_passes"], "unit": "slice-passes"}
    with Service(store) as service:
        assert service.depths == (config.tree().depth,) * config.shards
        whole = score(answers(service), cell.data.schema, cell.data.test)
        yield {"metric": "score healed", "x": HEALED, **whole}


def answers(service: Service) -> Predictor:
    """Give a service as a function of inputs; of a causal store the probabilities of each next token (n, l, C)."""
    if service.folder.schema.task == "causal":
        return lambda inputs: next_tokens(service, inputs)
    return lambda inputs: service.predict(inputs).scores


def next_tokens(service: Service, inputs: np.ndarray) -> np.ndarray:
    """Give the paths' mean probabilities of each next token (n, l, C) of texts (n, l)."""
    from s3t_ext.system.serving.writer import Writer

    writer, found = Writer(service), np.zeros((*inputs.shape, service.network.base.vocabulary), np.float32)
    for rows, x in by_length(torch.from_numpy(inputs)):
        found[rows.numpy(), : x.shape[1]] = writer(input_ids=x.clamp(min=0).long()).logits.exp().numpy()
    return found


def similarity(store: Path) -> Iterator[Row]:
    """Compare adapters by the cosine of what they add to a layer's weight, s B A, mean over layers and pairs.

    Along a sequence (one layer holds adapters of several stages in the placement ``stack``), and between nodes of one
    depth: of one shard, by the number of slices that they share, and of two shards on the same path.
    """
    with StoreFolder(store) as folder:
        live = folder.trained(folder.ledger.slices())
        nodes: dict[Node, Mapping[str, np.ndarray]] = {node: folder.nodes.get(name)[1] for node, name in live.items()}
    found: dict[str, list[float]] = {}
    for one, other in combinations(sorted(nodes), 2):
        relation = _relation(one, other)
        if relation and (value := cosine(nodes[one], nodes[other])) is not None:
            found.setdefault(relation, []).append(value)
    for relation, values in sorted(found.items()):
        row = {"metric": "similarity", "x": relation, "value": round(fmean(values), 5), "unit": "cosine"}
        yield row | {"records": len(values)}


def _relation(one: Node, other: Node) -> str | None:
    (shard, path), (shard_there, path_there) = one, other
    if shard != shard_there:
        return f"depth {len(path)}, other shard, same path" if path == path_there else None
    if len(path) == len(path_there):
        return f"depth {len(path)}, {len({*path} & {*path_there})} slices in common"
    short, long = sorted((path, path_there), key=len)
    return f"stages {len(short)} and {len(long)} of a sequence" if long[: len(short)] == short else None


def cosine(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float | None:
    """Compute the cosine of two adapters' B A, mean over the layers that both adapt; None: there are none.

        <B1 A1, B2 A2> = sum of (A1 A2^T) * (B1 B2^T), elementwise

    Args:
        one, other: ``LAYER.a`` (r, K) and ``LAYER.b`` (r, O), by name.
    """
    layers = [name.removesuffix(".a") for name in one if name.endswith(".a") and name in other]

    def inner(u: Mapping[str, np.ndarray], v: Mapping[str, np.ndarray], layer: str) -> float:
        a, b = (u[f"{layer}.{part}"].astype(np.float64) @ v[f"{layer}.{part}"].T for part in "ab")  # (r, r) each
        return float((a * b).sum())

    values = [inner(one, other, name) / (inner(one, one, name) * inner(other, other, name)) ** 0.5 for name in layers]
    return fmean(values) if values else None


METHODS: dict[str, Callable[[Cell], Iterator[Row]]] = {
    **{f"{name}-{placement}": run for placement in ("stack", "layers") for name in STRATEGIES},
    "one-slice": run,
    "unsharded": run,
}
