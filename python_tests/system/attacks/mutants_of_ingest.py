"""Mutants of what a table becomes: rules 1, 2 and 7. Each patches the product; see mutants.py."""

from __future__ import annotations

import itertools
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from s3t_ext.system import fit, folder, growth
from s3t_ext.system.data import ingest, reader, tables, values
from s3t_ext.system.folder import StoreFolder


def _whole(chunks):
    return chunks if isinstance(chunks, tables.Table) else tables.join(list(chunks))


def _lay_out(patch, changed) -> None:
    for module in (fit, growth):
        patch.setattr(module, "lay_out", changed)


# --- rule 1: placement ------------------------------------------------------------------------------------------------


def by_row(patch) -> None:
    rows = itertools.count()
    patch.setattr(ingest, "place", lambda key, subject, m, n, *_: divmod(next(rows) % (m * n), n))


def by_record(patch) -> None:
    place, seen = ingest.place, itertools.count()
    patch.setattr(ingest, "place", lambda key, subject, *rest: place(key, f"{subject}{next(seen) % 7}", *rest))


def rebalanced(patch) -> None:
    lay_out = ingest.lay_out

    def best(chunks, key, *rest, **_):
        table = _whole(chunks)
        tries = [lay_out(table, key.derive(f"try {i}"), *rest) for i in range(6)]
        return min(tries, key=lambda layout: max(map(len, layout.slices.values())))

    _lay_out(patch, best)


def owners_only(patch) -> None:
    names = values.subjects
    patch.setattr(values, "subjects", lambda *args: names(*args)[:1])


def as_typed(patch) -> None:
    patch.setattr(folder, "normalise_subject", lambda subject, rule: subject)


# --- rule 2: identity -------------------------------------------------------------------------------------------------


def versioned(patch) -> None:
    identity = StoreFolder.identity
    patch.setattr(StoreFolder, "identity", lambda *args: {**identity(*args), "version": version("s3t-ext")})


def no_digests(patch) -> None:
    identity = StoreFolder.identity
    patch.setattr(StoreFolder, "identity", lambda *args: {**identity(*args), "slices": []})


def unsalted(patch) -> None:
    commitment = folder.commitment
    patch.setattr(folder, "commitment", lambda salt, record: commitment(bytes(16), record))


# --- rule 7: declared before read ----------------------------------------------------------------------------------


def fitted_scaling(patch) -> None:
    lay_out = ingest.lay_out

    def fitted(chunks, *rest, **_):
        table = _whole(chunks)
        return lay_out(replace(table, inputs=table.inputs - table.inputs.mean()), *rest)

    _lay_out(patch, fitted)


def undeclared(patch) -> None:
    admit = fit.admit
    patch.setattr(fit, "admit", lambda store, layout, declared: admit(store, layout, {}))


# --- rule 10: derived data is data ---------------------------------------------------------------------------------


def tokens_kept(patch) -> None:
    """Texts are tokenised once: their rows stay in a cache in the store."""
    texts = reader.Reader._texts

    def cached(self, rows, column):
        ids = texts(self, rows, column)
        np.save(Path(self._base) / "tokens.npy", ids)
        return ids

    patch.setattr(reader.Reader, "_texts", cached)
