"""Signed receipts: whatever is changed is rejected, and what is not is believed without the store."""

import copy
import json
import pickle

import pytest

from s3t_ext.ledger import Ledger, ShardChange, canonical_json, receipts
from s3t_ext.ledger.log import GENESIS, link
from s3t_ext.ledger.signature import SigningKey, fault, read_public, read_receipt, sign
from s3t_ext.store.files import StoreError

from .conftest import CELLS, SUBJECTS, UNKNOWN, Holding

# RFC 8032, section 7.1, test 1
RFC = (
    "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
    "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
    "d25bf5f0595bbe24655141438e7a100b",
)
KEPT = {"node": "a" * 64, "slices": ["1" * 64, "2" * 64], "weights": "b" * 64, "provenance": None}
CHANGES = [ShardChange(0, ["d" * 64, "e" * 64], [KEPT, {**KEPT, "node": "c" * 64}], 2, 1), ShardChange(1, [], [], 0, 0)]


def make(path, key, names=("réquest 1", "r2")):
    """Give a ledger's public manifest and its signed receipts."""
    path.mkdir()
    with Ledger.create(path / "ledger.db", {"key": "0" * 64, "public_key": key.public, "deadline_days": 30}) as ledger:
        ledger.ingest(
            {cell: f"{index:x}" * 64 for index, cell in enumerate(CELLS)},
            [Holding(subject, *CELLS[index % 4]) for index, subject in enumerate(SUBJECTS)],
        )
        ledger.export("copy", "backup", ["a" * 64], CELLS)

        def receipt(applied):
            return sign(receipts.build(applied, CHANGES), key)

        made = [ledger.delete(name, [*SUBJECTS[i : i + 2], UNKNOWN], receipt) for i, name in enumerate(names)]
        return json.loads(ledger.declaration), made


@pytest.fixture
def key():
    return SigningKey.new()


@pytest.fixture
def signed(tmp_path, key):
    public, made = make(tmp_path / "one", key)
    return public, made[0]


def test_known_answer() -> None:
    key = SigningKey.from_hex(RFC[0])
    assert (key.public, key.sign(b"")) == RFC[1:]


def test_a_receipt_is_valid_in_any_order_of_keys(signed) -> None:
    public, receipt = signed
    assert fault(receipt, public) is None
    turned = reverse(receipt)
    assert list(turned) == list(receipt)[::-1]
    assert fault(turned, reverse(public)) is None


def reverse(value):
    if isinstance(value, dict):
        return {name: reverse(value[name]) for name in reversed(value)}
    return [reverse(item) for item in value] if isinstance(value, list) else value


def others(leaf):
    """Give values that are not `leaf`: near ones, and those that look alike in another type."""
    near = (
        [f"{leaf}x", f"x{leaf}", str(leaf).swapcase(), str(leaf)[1:], str(leaf)[:-1]] if isinstance(leaf, str) else []
    )
    if isinstance(leaf, int):
        near = [leaf + 1, leaf - 1, -leaf, float(leaf), bool(leaf), str(leaf)]
    return [*near, None, "", 0, False, [], {}, [leaf], {"": leaf}]


def tampered(receipt):
    """Yield (what was done, the receipt with it done) for every place in its tree."""

    def at(node, path):
        for name in path:
            node = node[name]
        return node

    def edit(path, change):
        new = copy.deepcopy(receipt)
        change(at(new, path))
        return new

    def walk(path):
        node = at(receipt, path)
        names = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        for name in names:
            yield f"removed {path} {name}", edit(path, lambda parent, name=name: parent.pop(name))
            for value in others(node[name]):
                yield f"changed {path} {name}", edit(path, lambda p, n=name, v=value: p.__setitem__(n, v))
            yield from walk((*path, name))
        if isinstance(node, dict):
            yield f"added to {path}", edit(path, lambda parent: parent.__setitem__("extra", None))
            for name in names:
                yield f"renamed {path} {name}", edit(path, lambda p, n=name: p.__setitem__(f"{n}_", p.pop(n)))
        elif isinstance(node, list):
            for item in (None, 0, "", *node):
                yield f"added to {path}", edit(path, lambda parent, item=item: parent.append(item))
            yield f"turned {path}", edit(path, lambda parent: parent.reverse())

    yield from walk(())
    for index, digit in enumerate(receipt["signature"]):
        for wrong in {"0", "f", "g"} - {digit}:
            text = receipt["signature"]
            yield f"signature digit {index}", {**receipt, "signature": text[:index] + wrong + text[index + 1 :]}


def test_every_tampered_field_is_rejected(signed, capsys) -> None:
    public, receipt = signed
    content = canonical_json(receipt)
    changed = [(what, new) for what, new in tampered(receipt) if canonical_json(new) != content]
    believed = [what for what, new in changed if fault(new, public) is None]
    assert not believed
    assert {name for name in receipt if any(what == f"removed () {name}" for what, _ in changed)} == set(receipt)
    assert len(changed) > 1000
    with capsys.disabled():
        print(f"\nreceipts: {len(changed)} tampered, {len(changed) - len(believed)} rejected")


def test_a_file_truncated_or_flipped_anywhere_is_rejected(signed, tmp_path, capsys) -> None:
    public, receipt = signed
    file, data = tmp_path / "receipt.json", canonical_json(receipt)

    def rejected(content) -> bool:
        file.write_bytes(content)
        try:
            read = read_receipt(file)
        except ValueError:
            return True
        return fault(read, public) is not None

    assert not rejected(data + b"\n")
    assert all(rejected(data[:end]) for end in range(len(data)))
    flips = [data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :] for i in range(len(data)) for bit in (0, 3, 5)]
    believed = [flip for flip in flips if not rejected(flip)]
    assert believed == [data.replace(b"\\u00e9", b"\\u00E9")], "the same letter in another spelling"
    with capsys.disabled():
        print(f"\nreceipts: {len(data)} truncations and {len(flips) - len(believed)} flips rejected")


def test_a_key_that_comes_twice_is_refused(signed, tmp_path) -> None:
    _, receipt = signed
    data = canonical_json(receipt)
    for extra in (b'{"request_id":"other",', b'{"signature":"",'):
        (tmp_path / "twice").write_bytes(extra + data[1:])
        with pytest.raises(ValueError, match="expected one JSON object"):
            read_receipt(tmp_path / "twice")


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b'"text"', b"1", b"[" * 10**5, b'{"a":NaN}', b"\xff", b"{}{}"])
def test_what_is_no_receipt_is_refused(data, tmp_path) -> None:
    (tmp_path / "file").write_bytes(data)
    for read in (read_receipt, read_public):
        with pytest.raises(ValueError, match="expected one JSON object"):
            read(tmp_path / "file")


def test_signatures_of_others_are_rejected(tmp_path, key) -> None:
    public, (first, second) = make(tmp_path / "one", key)
    rest = {name: value for name, value in first.items() if name != "signature"}
    assert fault({**first, "signature": second["signature"]}, public) is not None
    forged = sign(rest, SigningKey.new())
    assert "another key" in fault(forged, public)
    # The same key in another store, and a manifest that names another key.
    elsewhere, _ = make(tmp_path / "two", key)
    assert "another store" in fault(first, elsewhere)
    other = {**public, "meta": {**public["meta"], "public_key": SigningKey.new().public}}
    assert "another store" in fault(first, other)


def test_receipts_without_signature_are_named_as_such(signed) -> None:
    public, receipt = signed
    rest = {name: value for name, value in receipt.items() if name != "signature"}
    assert "not signed" in fault(rest, public)
    assert "not signed" in fault({"format": 1, "ledger": {"seq": 3, "previous": "0" * 64}}, public)


def test_the_chain_after_a_receipt_follows_from_it(tmp_path, key) -> None:
    public, (first, second) = make(tmp_path / "one", key)
    assert first["ledger"]["origin"] == link(GENESIS, "created", canonical_json(public)).hex()
    assert receipts.head_after(first) == second["ledger"]["previous"]
    assert receipts.head_after({**first, "promise": ""}) != second["ledger"]["previous"]


@pytest.mark.parametrize("field", ["format", "meta", "public_key"])
def test_a_damaged_public_manifest_is_refused(signed, tmp_path, field) -> None:
    public, _ = signed
    (public["meta"] if field == "public_key" else public)[field] = "ab"
    (tmp_path / "public").write_text(json.dumps(public))
    with pytest.raises((ValueError, StoreError), match="public"):
        read_public(tmp_path / "public")


def test_the_secret_does_not_leave_the_key(key) -> None:
    assert key.hex() not in f"{key!r} {key} {key.public} {key.sign(b'')}"
    with pytest.raises(TypeError):
        pickle.dumps(key)
    with pytest.raises(ValueError, match="64 hex digits") as raised:
        SigningKey.from_hex(key.hex()[:-1])
    assert key.hex()[:-1] not in str(raised.value)
