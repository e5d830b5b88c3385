"""Tables in memory: normalised and checked as those from files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny as t

import s3t_ext


def test_subjects_in_memory_are_normalised(mlp, tmp_path) -> None:
    shouted = replace(mlp.table, subjects=[(names[0].upper() + " ",) for names in mlp.table.subjects])
    store = mlp.fit(tmp_path / "store", shouted)
    assert s3t_ext.delete(store, ["Person  3"])["subjects"][0]["status"] == "deleted"
    assert t.weights(store).items() <= t.weights(mlp.fit(tmp_path / "other")).items()


@pytest.mark.parametrize("wrong", ["strings", "labels", "lengths", "nan", "shape", "empty"])
def test_bad_tables_in_memory_are_refused(mlp, tmp_path, wrong) -> None:
    table = mlp.table
    x = table.inputs.copy()
    if wrong == "nan":
        x[3, 0] = np.nan
    bad = {
        "strings": s3t_ext.system.tables.Table([names[0] for names in table.subjects], x, table.labels),
        "labels": s3t_ext.system.tables.Table(table.subjects, x, table.labels + 2),
        "lengths": s3t_ext.system.tables.Table(table.subjects, x[:-1], table.labels),
        "nan": s3t_ext.system.tables.Table(table.subjects, x, table.labels),
        "shape": s3t_ext.system.tables.Table(table.subjects, x[:, :-1], table.labels),
        "empty": s3t_ext.system.tables.Table([], x[:0], table.labels[:0]),
    }[wrong]
    with pytest.raises(ValueError, match="table"):
        mlp.fit(tmp_path / "store", bad)
    assert not (tmp_path / "store").exists()
