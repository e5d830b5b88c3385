"""The arrows between the rooms, read off the syntax trees; and what importing the package loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import s3t_ext

PACKAGE = Path(s3t_ext.__file__).parent
MAY_IMPORT = {
    "store": set(),
    "plan": {"store"},
    "ledger": {"store"},
    "lora": set(),
    "models": {"lora"},
    "approximate": {"lora", "models"},
    "system": {"plan", "ledger", "store", "lora", "models"},
    "cli": {"system", "approximate", "plan", "ledger", "store", "lora", "models", "demo"},
    "demo": {"system", "plan", "ledger", "lora", "models"},
}
TORCH_FREE = {"store", "plan", "ledger"}
ALSO = {"system/audit.py": {"approximate"}}  # one file may see what its room may not
SHARED = {"config", "settings", "folder", "network"}  # of the roof: what its inner rooms see beside data
ROOF = {"data": set(), "training": {"data", *SHARED}, "serving": {"data", *SHARED, "serve"}}  # the rest see all


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def violations(room: str, names: set[str], file: str = "") -> set[str]:
    """Give the imports that no arrow allows."""
    inside = {n.split(".")[1] for n in names if n.startswith("s3t_ext.") and n.split(".")[1] in MAY_IMPORT}
    bad = inside - MAY_IMPORT[room] - ALSO.get(file, set()) - {room}
    if room in TORCH_FREE:
        bad |= {n for n in names if n.split(".")[0] in ("torch", "triton", "peft", "transformers")}
    return bad


def violations_inside(room: str, names: set[str]) -> set[str]:
    """Give the imports of a room of the roof that no arrow allows there."""
    inside = {n.split(".")[2] for n in names if n.startswith("s3t_ext.system.")}
    return inside - ROOF.get(room, inside) - {room}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_arrows(path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in MAY_IMPORT, f"{room}: a room without arrows"
    assert not violations(room, imports(path), path.relative_to(PACKAGE).as_posix())
    if room == "system":
        assert not violations_inside(path.relative_to(PACKAGE).parts[1], imports(path))


def test_a_wrong_arrow_is_seen() -> None:
    assert violations("models", {"s3t_ext.ledger.identity"}) == {"ledger"}
    assert violations("ledger", {"torch.nn"}) == {"torch.nn"}
    assert violations("lora", {"s3t_ext.system"}) == {"system"}
    assert violations("system", {"s3t_ext.approximate"}, "system/verify.py") == {"approximate"}
    assert violations_inside("training", {"s3t_ext.system.serve", "s3t_ext.system.folder"}) == {"serve"}


@pytest.mark.parametrize(
    "statement",
    ["import s3t_ext", "import s3t_ext.plan, s3t_ext.ledger, s3t_ext.store", "from s3t_ext.system import unlearn"],
)
def test_books_load_no_torch(statement) -> None:
    check = (
        f"import sys; {statement}; print([m for m in ('torch', 'triton', 'peft', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in s3t_ext.__all__:
        assert getattr(s3t_ext, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        s3t_ext.nothing  # noqa: B018
