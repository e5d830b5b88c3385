"""``s3t receipt``: shown by the store, verified without it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from s3t_ext.ledger import receipts
from s3t_ext.store.crypt import StoreKey, seal
from s3t_ext.system.folder import StoreFolder

from .test_cli import ask, call, processor_seconds, refused


@pytest.fixture
def store(files, fit_words, capsys):
    ask(capsys, *fit_words)
    return files / "store"


@pytest.fixture
def made(files, store, capsys):
    """Delete a person; give the receipt's file and the public manifest, away from the store."""
    ask(capsys, "delete", store, "person 3", "--request-id", "r1")
    assert call(capsys, "receipt", "show", store, "r1", "--out", files / "r1.json")[0] == 0
    shutil.copy(store / "public.json", files / "public.json")
    return files / "r1.json", files / "public.json"


def test_show_and_verify(files, store, made, capsys) -> None:
    file, public = made
    receipt = ask(capsys, "delete", store, "person 3", "--request-id", "r1")
    assert ask(capsys, "receipt", "show", store, "r1") == receipt == json.loads(file.read_bytes())
    assert call(capsys, "receipt", "show", store, "r1")[1].encode() == file.read_bytes(), "text is canonical JSON too"
    after = ask(capsys, "delete", store, "person 4")
    shutil.rmtree(store)
    verdict = ask(capsys, "receipt", "verify", file, "--public", public)
    assert verdict == {
        "valid": True, "request_id": "r1", "seq": receipt["ledger"]["seq"], "head": receipts.head_after(receipt)
    }  # fmt: skip
    assert after["ledger"]["origin"] == receipt["ledger"]["origin"]
    status, out, _ = call(capsys, "receipt", "verify", file, "--public", public)
    assert (status, out.count("\n")) == (0, 1)
    assert verdict["head"] in out


def test_a_receipt_names_the_weights_that_stay(store, capsys) -> None:
    from tiny import weights

    receipt = ask(capsys, "delete", store, "person 3")
    kept = [node for shard in receipt["shards"] for node in shard["kept"]]
    assert {node["weights"] for node in kept} <= set(weights(store).values())
    assert all(len(node["provenance"]) == 64 for node in kept)
    assert kept


def test_a_damaged_node_keeps_nobody_from_being_deleted(store, capsys) -> None:
    for manifest in (store / "nodes").glob("*.json"):
        manifest.write_bytes(b"")
    receipt = ask(capsys, "delete", store, "person 3")
    kept = [node for shard in receipt["shards"] for node in shard["kept"]]
    assert {(node["weights"], node["provenance"]) for node in kept} == {(None, None)}


def test_an_invalid_receipt_gives_status_1_and_says_why(files, made, capsys) -> None:
    file, public = made
    receipt = json.loads(file.read_bytes())
    unsigned = {name: value for name, value in receipt.items() if name != "signature"}
    for wrong, why in (
        ({**receipt, "applied": receipt["received"] + "0"}, "was changed"),
        (unsigned, "not signed"),
        ({**unsigned, "format": 1}, "not signed"),
        ({**receipt, "ledger": {}}, "another store"),
    ):
        file.write_text(json.dumps(wrong))
        status, out, err = call(capsys, "receipt", "verify", file, "--public", public)
        assert (status, out.count("\n"), err) == (1, 1, "")
        assert why in out
        status, out, _ = call(capsys, "receipt", "verify", file, "--public", public, "--json")
        assert (status, json.loads(out)["valid"]) == (1, False)


def test_bad_input_gives_status_2(files, store, made, capsys) -> None:
    file, public = made
    refused(capsys, "receipt", says="ACTION")
    refused(capsys, "receipt", "show", store, "nosuch", says="no request 'nosuch'")
    refused(capsys, "receipt", "show", files, "r1", says="holds no store")
    refused(capsys, "receipt", "verify", file, says="--public")
    refused(capsys, "receipt", "verify", files / "nosuch", "--public", public, says="cannot read")
    refused(capsys, "receipt", "verify", file, "--public", file, says="no public key")
    file.write_bytes(file.read_bytes()[:-2])
    refused(capsys, "receipt", "verify", file, "--public", public, says="expected one JSON object")


def test_verify_takes_less_than_a_second_and_needs_little(made) -> None:
    script = (
        "import sys; from s3t_ext.cli.main import main\n"
        f"assert main(['receipt', 'verify', {str(made[0])!r}, '--public', {str(made[1])!r}]) == 0\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    times = [processor_seconds([sys.executable, "-c", script]) for _ in range(3)]
    assert min(times) < 1, times


def test_status_loads_no_cryptography(store) -> None:
    script = (
        f"import sys; from s3t_ext.cli.main import main; assert main(['status', {str(store)!r}]) == 0\n"
        "assert 'cryptography' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_the_signing_key_is_nowhere_in_plain(files, store, made, capsys) -> None:
    path = store / "signing-key"
    with StoreFolder(store) as folder:
        secret, store_key = folder.signing_key.hex(), folder.files.key
    others = [p for p in files.rglob("*") if p.is_file()]
    assert len(others) > 10
    assert not [p for p in others if secret.encode() in p.read_bytes() or bytes.fromhex(secret) in p.read_bytes()]
    words = [["delete", store, "person 9"], ["receipt", "show", store, "r1"], ["status", store]]
    for text in (secret, secret[:-1], secret[:-1] + ("0" if secret[-1] != "0" else "1"), f"{secret}zz"):
        path.write_bytes(seal("signing-key", text.encode(), store_key))
        for command in words:
            for as_json in ([], ["--json"]):
                _, out, err = call(capsys, *command, *as_json)
                assert secret[:-1] not in out + err


def test_another_signing_key_deletes_nothing(store, made, capsys) -> None:
    before = ask(capsys, "status", store)
    path, key, store_key = store / "signing-key", (store / "signing-key").read_bytes(), StoreKey.find(store)
    for spoil in (
        lambda: path.write_bytes(seal("signing-key", b"00" * 32, store_key)),
        lambda: path.write_bytes(seal("key", bytes.fromhex("00" * 32), store_key)),
        lambda: path.write_bytes(b"zz"),
        lambda: path.unlink(),
    ):
        spoil()
        refused(capsys, "delete", store, "person 8", says="signing-key")
        assert ask(capsys, "status", store) == before
        assert ask(capsys, "delete", store, "person 3", "--request-id", "r1")["signature"], "acknowledged before"
    path.write_bytes(key)
    assert ask(capsys, "delete", store, "person 8")["signature"]
