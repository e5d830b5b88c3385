"""Mutants of serving, deletion and verification: rules 2, 9 to 11 and 13 to 15. See mutants.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from mutants_of_serving import ByDirty

from s3t_ext.ledger import Ledger
from s3t_ext.ledger.fence import Fence
from s3t_ext.lora.nn import MaskedLoRALinear
from s3t_ext.store import files, nodes
from s3t_ext.store.files import destroy, read_checked
from s3t_ext.store.nodes import NodeStore
from s3t_ext.store.records import RecordStore
from s3t_ext.system import growth, heal, serve, unlearn, verify
from s3t_ext.system.data import ingest, tables
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.serve import Service
from s3t_ext.system.training.train import Trainer


def listed(patch) -> None:
    """Rule 2: what lies in the folder is served."""

    def trained(self, slices):
        manifests = [read_checked(path) for path in sorted((self.path / "nodes").glob("*.json"))]
        return {(m["identity"]["shard"], tuple(m["identity"]["path"])): m["id"] for m in manifests}

    patch.setattr(StoreFolder, "trained", trained)


def multiplied(patch) -> None:
    """Rule 9: every adapter is computed, and those that are masked are multiplied by zero."""
    skipping = MaskedLoRALinear.forward

    def forward(self, x):
        if self.train_pool is not None or not len(self.a):
            return skipping(self, x)
        ids, offsets = self._routing[0].view(self.columns, x)
        rows = x.reshape(-1, self.in_features)  # (T, K)
        live = torch.zeros(len(rows), len(self.a))  # (T, N)
        for group, row in enumerate(ids.tolist()):
            live[offsets[group] : offsets[group + 1], [n for n in row if n >= 0]] = self.scale
        low = torch.einsum("tk,nrk->tnr", rows, self.a)
        each = torch.einsum("tnr,nro->tno", low, self.b)
        y = F.linear(rows, self.weight, self.bias) + (each * live[:, :, None]).sum(1)
        return y.view(*x.shape[:-1], -1)

    patch.setattr(MaskedLoRALinear, "forward", forward)


# --- rule 10: derived data --------------------------------------------------------------------------------------------


def kept_in_memory(patch) -> None:
    patch.setattr(Service, "_poison", lambda self: None)


def loaded_kept(patch) -> None:
    get = NodeStore.get

    def kept(self, node):
        cache = self.__dict__.setdefault("cache", {})
        return cache.setdefault(node, get(self, node))

    patch.setattr(NodeStore, "get", kept)


def nodes_stay(patch) -> None:
    patch.setattr(NodeStore, "erase", lambda self, node: None)


def blobs_stay(patch) -> None:
    patch.setattr(NodeStore, "erase", lambda self, node: destroy(self._paths(node)[1]))


def unlinked(patch) -> None:
    for module in (files, nodes):
        patch.setattr(module, "destroy", files.remove)


def records_stay(patch) -> None:
    patch.setattr(RecordStore, "erase_subjects", lambda self, shard, slice_, subjects: 0)


def dead_if_there(patch) -> None:
    """A node that is published while the request is recorded is in no receipt, and stays."""
    receipt, build = unlearn._receipt, unlearn.build_receipt

    def short(folder, *rest):
        def cut(applied, shards):
            return build(applied, [replace(s, dead=list(filter(folder.nodes.has, s.dead))) for s in shards])

        with patch.context() as inner:
            inner.setattr(unlearn, "build_receipt", cut)
            return receipt(folder, *rest)

    patch.setattr(unlearn, "_receipt", short)


def exports_untold(patch) -> None:
    build = unlearn.build_receipt
    patch.setattr(unlearn, "build_receipt", lambda applied, *rest: build(replace(applied, exports=()), *rest))


def cached_answers(patch) -> None:
    compute = Service._compute

    def cached(self, x, *rest):
        kept = self.__dict__.setdefault("kept", {})
        return kept.setdefault(x.numpy().tobytes(), compute(self, x, *rest))

    patch.setattr(Service, "_compute", cached)


# --- rule 11: the choice of what to serve -----------------------------------------------------------------------------


def ties_by_requests(patch) -> None:
    best = StoreFolder.best

    def turned(self, trained):
        odd = len(self.ledger.requests()) % 2
        chosen = best(self, trained)
        if not odd:
            return chosen
        return [
            max(
                (path for s, path in trained if s == shard and len(path) == len(usual)),
                default=(),
            )
            for shard, usual in enumerate(chosen)
        ]

    patch.setattr(StoreFolder, "best", turned)


def cut_path(patch) -> None:
    route, best = Service._route, StoreFolder.best

    def kept(self, trained):
        before = self.__dict__.get("before", {})
        alive = lambda s, path: [d for d in range(1, len(path) + 1) if (s, path[:d]) in trained]  # noqa: E731
        cut = {shard: path[: max(alive(shard, path), default=0)] for shard, path in before.items()}
        return [cut.get(shard, path) for shard, path in enumerate(best(self, trained))]

    def remembered(self):
        route(self)
        self.folder.__dict__.setdefault("before", {}).update((shard, path) for shard, path, _ in self._routed.served)

    patch.setattr(StoreFolder, "best", kept)
    patch.setattr(Service, "_route", remembered)


# --- rule 13: no return -----------------------------------------------------------------------------------------------


def returned(patch) -> None:
    lay_out = ingest.lay_out
    patch.setattr(growth, "lay_out", lambda table, key, m, n, deleted, *rest: lay_out(table, key, m, n, set(), *rest))


def returned_co(patch) -> None:
    lay_out, subject_hash = ingest.lay_out, ingest.subject_hash

    def by_owner(chunks, key, shards, slices, deleted, *rest):
        table = chunks if isinstance(chunks, tables.Table) else tables.join(list(chunks))
        owners = {subject_hash(key, names[0]) for names in table.subjects}
        return lay_out(table, key, shards, slices, deleted & owners, *rest)

    patch.setattr(growth, "lay_out", by_owner)


def healed_as_it_lies(patch) -> None:
    """What is in a slice's file is what was left of it."""
    patch.setattr(heal, "deleted_in", lambda folder, cell: {})


def healed_early(patch) -> None:
    """A slice is healed whatever came in since its records were read."""
    real = Ledger.heal

    def anyway(self, slices, *rest):
        with self._database.reading() as state:
            held = dict(state.requests)
            state.requests.update({name: replace(row, state="erased") for name, row in held.items()})
        try:
            return real(self, slices, *rest)
        finally:
            state.requests.update(held)

    patch.setattr(Ledger, "heal", anyway)


def forgotten_id(patch) -> None:
    record = unlearn.delete_from
    for module in (unlearn, serve):
        patch.setattr(module, "delete_from", lambda folder, subjects, request_id: record(folder, subjects, None))


def readmitted_anyway(patch) -> None:
    """Who is let in again stays, though they asked again to be forgotten since."""
    grow = Ledger.grow
    patch.setattr(Ledger, "grow", lambda self, slices, holdings, back, since: grow(self, slices, holdings, back))


# --- rule 14: release -------------------------------------------------------------------------------------------------


def unchecked(patch) -> None:
    patch.setattr(Service, "refresh", lambda self: None)


def checked_before(patch) -> None:
    refresh, predict = Service.refresh, Service.predict

    def once(self):
        if not self.__dict__.pop("checked", False):
            refresh(self)
            self.checked = True

    def asked(self, inputs):
        self.__dict__.pop("checked", None)
        return predict(self, inputs)

    patch.setattr(Service, "refresh", once)
    patch.setattr(Service, "predict", asked)


def epoch_stays(patch) -> None:
    patch.setattr(Fence, "raise_to", lambda self, epoch: None)


def deferred(patch) -> None:
    record, erase, later = serve.delete_from, serve.erase_or_warn, []

    def promised(folder, subjects, request_id):
        later.append((subjects, request_id))
        return {"request_id": request_id, "shards": []}

    def then(folder):
        while later:
            record(folder, *later.pop(0))
        erase(folder)

    patch.setattr(serve, "delete_from", promised)
    patch.setattr(serve, "erase_or_warn", then)


def masked_late(patch) -> None:
    def acknowledge(self, subjects, request_id=None):
        with self._lock:
            receipt = serve.delete_from(self.folder, subjects, request_id)
            self._mask(serve.cells(self.folder, subjects))
            self._poison()
        return receipt

    patch.setattr(Service, "acknowledge", acknowledge)


# --- rule 15: the oracle comes by the front door ----------------------------------------------------------------------


def stores_records(patch) -> None:
    compare = verify.compare

    def trusting(path, *rest):
        def copied(table, schema):
            with StoreFolder(path) as folder:
                parts = [folder.records.get(*cell) for cell in folder.ledger.slices()]
            rows = [row for part in parts for row in zip(part.subjects, part.inputs, part.labels, strict=True)]
            return tables.Table(
                [tuple(names) for names, _, _ in rows],
                np.stack([x for _, x, _ in rows]),
                np.stack([y for _, _, y in rows]),
            )

        with patch.context() as inner:
            inner.setattr(verify, "read_chunks", lambda table, schema, _: iter([copied(table, schema)]))
            return compare(path, *rest)

    patch.setattr(verify, "compare", trusting)


def stores_weights(patch) -> None:
    compare = verify.compare

    def trusting(path, *rest):
        def copied(self, wanted, progress):
            with StoreFolder(path) as store:
                live = store.trained(store.ledger.slices())
                slices = self.folder.ledger.slices()
                for (shard, nodes), name in wanted.items():
                    parent = wanted.get((shard, nodes[:-1]), "")
                    identity = self.folder.identity(shard, nodes, slices, parent)
                    assert (
                        self.folder.nodes.put(identity, store.nodes.get(live[shard, nodes])[1], self.provenance) == name
                    )

        with patch.context() as inner:
            inner.setattr(Trainer, "train", copied)
            return compare(path, *rest)

    patch.setattr(verify, "compare", trusting)


def verified_by_node(patch) -> None:
    """A node that was healed meanwhile is compared, though it is another one now."""
    patch.setattr(verify, "StoreFolder", ByDirty)


def certified_anyway(patch) -> None:
    certify = verify._certify
    patch.setattr(
        verify,
        "_certify",
        lambda path, erased, result, *rest: certify(path, erased, {**result, "mismatched": 0}, *rest),
    )
