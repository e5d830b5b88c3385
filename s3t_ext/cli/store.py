"""The store that a command names: opened before anything slow is imported; and what is said of its lost slices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3t_ext.system import wording

if TYPE_CHECKING:
    from s3t_ext.system.folder import StoreFolder


def opened(store: Path | str, *tables: Path | str | None, inputs: bool = False) -> StoreFolder:
    """Open a store, and look at the first row of tables: a wrong path is said before torch is imported.

    Args:
        inputs: the tables have those columns only.
    """
    from s3t_ext.system.data.tables import check_first_row
    from s3t_ext.system.folder import StoreFolder

    folder = StoreFolder(store)
    for table in tables:
        if table is not None:
            check_first_row(table, folder.schema, inputs)
    return folder


def told(report: Mapping[str, Any]) -> str:
    """Give what `wording.told` does, each line after a break."""
    return "".join(f"\n{line}" for line in wording.told(report))
