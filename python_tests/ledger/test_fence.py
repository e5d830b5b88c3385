"""The epoch word: grows only, seen by other processes, refused when torn."""

import pytest

from s3t_ext.ledger import Fence, LedgerError


def test_it_grows_only(tmp_path):
    with Fence.create(tmp_path / "epoch") as fence, Fence(tmp_path / "epoch") as other:
        assert fence.read() == other.read() == 0
        for epoch, wanted in ((5, 5), (3, 5), (2**40, 2**40)):
            fence.raise_to(epoch)
            assert fence.read() == other.read() == wanted
    assert (tmp_path / "epoch").read_bytes() == (2**40).to_bytes(8, "little")


def test_another_process_sees_it(tmp_path, spawn):
    fence = Fence.create(tmp_path / "epoch")
    child = spawn(
        "fence = Fence(sys.argv[1]); print(fence.read(), flush=True)\n"
        "while fence.read() < 7: pass\n"
        "print(fence.read())",
        tmp_path / "epoch",
    )
    assert child.stdout.readline() == "0\n"
    fence.raise_to(7)
    assert child.communicate(timeout=3000)[0] == "7\n"


def test_concurrent_raises_never_lower_it(tmp_path, spawn):
    fence = Fence.create(tmp_path / "epoch")
    code = (
        "fence = Fence(sys.argv[1])\n"
        "for n in range(int(sys.argv[2]), 400, 2):\n    fence.raise_to(n)\n    assert fence.read() >= n"
    )
    children = [spawn(code, tmp_path / "epoch", start) for start in (1, 2)]
    assert [child.wait(timeout=30) for child in children] == [0, 0]
    assert fence.read() == 399


@pytest.mark.parametrize("change", ["replace", "unlink"])
def test_another_file_at_its_path_is_refused(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    with Fence.create("epoch") as fence:
        monkeypatch.chdir("/")
        fence.check()
        fence.raise_to(3)
        fence.check()
        if change == "replace":
            (tmp_path / "copy").write_bytes((tmp_path / "epoch").read_bytes())
            (tmp_path / "copy").replace(tmp_path / "epoch")
        else:
            (tmp_path / "epoch").unlink()
        with pytest.raises(LedgerError, match=r"epoch is not the file .* moved or replaced under the service; open it"):
            fence.check()


def test_a_torn_missing_or_present_file_is_refused(tmp_path):
    (tmp_path / "epoch").write_bytes(bytes(7))
    with pytest.raises(LedgerError, match="has 7 bytes where an epoch has 8"):
        Fence(tmp_path / "epoch")
    with pytest.raises(LedgerError, match=r"cannot open .*nosuch: No such file or directory; check the path"):
        Fence(tmp_path / "nosuch")
    with pytest.raises(LedgerError, match=r"cannot create .*epoch: File exists"):
        Fence.create(tmp_path / "epoch")
