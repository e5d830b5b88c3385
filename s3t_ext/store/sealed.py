"""The sealed files of a store, written and read under the store key of the moment."""

from __future__ import annotations

import os
from pathlib import Path

from s3t_ext.store.crypt import HEAD, SLOT, USED, StoreKey, seal, unseal
from s3t_ext.store.files import Damaged, atomic_write, exists, read_bytes, system_errors


def looks_sealed(data: bytes) -> bool:
    """Tell by its form whether content was sealed, for whatever key: two slots that end in zeros, not both empty."""
    slots = data[:SLOT], data[SLOT:HEAD]
    return len(data) > HEAD and any(map(any, slots)) and not any(any(slot[USED:]) for slot in slots)


class SealedFiles:
    """The sealed files of one store: each is written and read under its own name.

    The store key is found when it is first needed, and again once a rotation has put another in its place.

    Args:
        root: the store's folder.
        key: the store key of a store that is being made, or that no other process opens. Default: found.
    """

    def __init__(self, root: str | Path, key: StoreKey | None = None) -> None:
        self.root = Path(root)
        self._key, self._fixed = key, key is not None
        self._seen: tuple[int, int] | None = None

    @property
    def key(self) -> StoreKey:
        """The store key of this moment; under the writer's lock it stays so.

        Raises:
            StoreError: see `StoreKey.find`.
        """
        if self._fixed and self._key is not None:
            return self._key
        with system_errors("read", self.root / "store.json"):
            found = os.stat(self.root / "store.json")
        seen = found.st_ino, found.st_mtime_ns
        if self._key is None or seen != self._seen:
            self._key, self._seen = StoreKey.find(self.root), seen
        return self._key

    def name(self, path: Path) -> str:
        """Name a file below the root, as its seal does: without suffix."""
        return path.relative_to(self.root).with_suffix("").as_posix()

    def all(self) -> list[Path]:
        """List the sealed files that are there, in a fixed order."""
        with system_errors("search", self.root):
            blobs = sorted(path for folder in ("nodes", "records") for path in (self.root / folder).glob("*.sealed"))
        return [path for path in (self.root / "key", self.root / "signing-key") if exists(path)] + blobs

    def write(self, path: Path, data: bytes, *, destroy_old: bool = False) -> None:
        """Seal and write a file durably; see `atomic_write`."""
        atomic_write(path, seal(self.name(path), data, self.key), destroy_old=destroy_old)

    def read(self, path: Path) -> bytes:
        """Read and open a file.

        Raises:
            StoreError: it is missing, or the store key is; Damaged: damaged, or another file in this one's place.
        """
        while True:
            key = self.key
            try:
                return unseal(self.name(path), read_bytes(path), key)
            except ValueError as error:
                if self.key == key:  # otherwise a rotation ended between the two
                    raise Damaged(f"{path} is damaged: {error}; restore it from a backup") from None
