"""A store without torch and its past: what was asked of it, and the copies of it that somebody keeps."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import plain

from s3t_ext.ledger import canonical_json
from s3t_ext.system import unlearn
from s3t_ext.system.backup import backup
from s3t_ext.system.folder import StoreFolder


@dataclass
class History:
    """A store, what was asked of it, and copies of it outside its folder."""

    world: plain.World
    aside: Path
    receipts: list[dict] = field(default_factory=list)

    def delete(self, *people: str, erase: bool = True) -> dict:
        request = f"r{len(self.receipts)}"
        self.world.begun[request] = people
        with StoreFolder(self.world.path) as folder:
            receipt = unlearn.delete_from(folder, people, request)
            if erase:
                unlearn.erase_pending(folder)
        self.world.acknowledge(request, receipt)
        self.world.check()
        self.receipts.append(receipt)
        (self.aside / "receipts").mkdir(exist_ok=True)
        (self.aside / "receipts" / f"{request}.json").write_bytes(canonical_json(receipt))
        return receipt

    def backup(self, name: str = "backup") -> Path:
        backup(self.world.path, self.aside / name)
        return self.aside / name

    def snapshot(self, name: str) -> Path:
        shutil.copytree(self.world.path, self.aside / name)
        return self.aside / name

    def put_back(self, snapshot: Path) -> None:
        self.lose()
        shutil.copytree(snapshot, self.world.path)

    def lose(self) -> None:
        shutil.rmtree(self.world.path, ignore_errors=True)

    def dead(self) -> int:
        """Count the nodes that must not be served."""
        gone = {person for people in self.world.begun.values() for person in people}
        return len(self.world.dead({self.world.cells[person] for person in gone if person in self.world.cells}))

    @property
    def people(self) -> list[str]:
        return sorted(self.world.cells)

    @property
    def written(self) -> Path:
        return self.aside / "receipts"

    def ledger(self, name: str) -> Path:
        """Copy the ledger at rest."""
        shutil.copy(self.world.path / "ledger.sqlite", self.aside / name)
        return self.aside / name
