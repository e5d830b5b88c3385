"""Keyed names: fixed values, unambiguous inputs, hidden secrets, stable normal forms."""

import hashlib
import hmac
import pickle
import struct
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3t_ext.ledger import (
    Key,
    commitment,
    node_identity,
    normalise_subject,
    record_key,
    slice_digest,
    subject_hash,
)
from s3t_ext.ledger.identity import framed

KEY = Key(bytes(range(32)))
assigned = st.text(st.characters(exclude_categories=("Cn", "Cs")))


def plain_mac(secret, *parts):
    joined = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    return hmac.new(secret, joined, hashlib.sha256).digest()


def test_names_are_the_documented_macs():
    """Written out from the definition: what a store holds may never be named otherwise."""
    secret = bytes(range(32))
    subject, record = plain_mac(secret, b"derive", b"subject"), plain_mac(secret, b"derive", b"record")
    assert subject_hash(KEY, "ann") == plain_mac(subject, b"ann").hex()
    two, one = struct.pack("<Q", 2), struct.pack("<Q", 1)
    assert record_key(KEY, ["ann", "bob"], b"row", 1) == plain_mac(record, two, b"ann", b"bob", b"row", one)


@given(st.lists(st.binary(max_size=9)), st.lists(st.binary(max_size=9)))
def test_framing_is_unambiguous(parts, others):
    assert (framed(*parts) == framed(*others)) == (parts == others)


def test_record_keys_differ_in_every_field():
    fields = [(["a"], b"x", 0), (["a"], b"x", 1), (["a", "x"], b"", 0), ([], b"ax", 0), (["b"], b"x", 0)]
    assert len({record_key(KEY, *each) for each in fields}) == len(fields)


def test_a_key_hides_its_secret():
    key = Key.new()
    assert key != Key.new()
    assert key == Key.from_hex(key.hex())
    assert key.derive("a") != key.derive("b")
    assert key.hex() not in repr(key) + str(vars(type(key)))
    assert repr(key) == "Key(...)"
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(key)
    for odd in ("00" * 31, "zz" * 32, "00" * 33):
        with pytest.raises(ValueError, match="wanted") as caught:
            Key.from_hex(odd)
        assert odd not in str(caught.value)


def test_slice_digest_depends_on_the_set_and_count_alone():
    one, two = commitment(b"s" * 16, b"one"), commitment(b"t" * 16, b"two")
    assert one == hashlib.sha256(struct.pack("<Q", 16) + b"s" * 16 + struct.pack("<Q", 3) + b"one").digest()
    assert slice_digest([one, two]) == slice_digest(iter([two, one]))
    assert len({slice_digest(each) for each in ([], [one], [one, one], [one, two])}) == 4
    with pytest.raises(ValueError, match="salt: wanted at least 16"):
        commitment(b"short", b"")


def test_node_identity_is_canonical():
    assert node_identity({"b": 1, "a": [2]}) == hashlib.sha256(b'{"a":[2],"b":1}').hexdigest()


@given(assigned, st.sampled_from(["nfkc-casefold", "exact"]))
def test_normalising_twice_changes_nothing(subject, rule):
    try:
        once = normalise_subject(subject, rule)
    except ValueError:
        assert not unicodedata.normalize("NFKC", subject).strip()
    else:
        assert normalise_subject(once, rule) == once


def test_every_character_has_a_stable_form():
    for code in range(0, sys.maxunicode + 1, 7):
        if unicodedata.category(chr(code)) not in ("Cn", "Cs"):
            once = normalise_subject("a" + chr(code))
            assert normalise_subject(once) == once


def test_what_counts_as_the_same_subject():
    same = ["Ann  Müller", " ann müller\t", "ANN MU\u0308LLER", "Ann\u00a0Mu\u0308ller", "\uff21nn m\u00fcller"]
    assert {normalise_subject(subject) for subject in same} == {"ann müller"}
    assert normalise_subject("Straße") == normalise_subject("STRASSE")
    assert normalise_subject("Mu\u0308 ", "exact") == "Mü "
    assert normalise_subject("Ann", "exact") != normalise_subject("ann", "exact")


@pytest.mark.parametrize("subject", ["", "  \u00a0", "a\ud800", "a\U000e0fff", 7])
def test_odd_subjects_are_refused(subject):
    with pytest.raises(ValueError, match=r"subject: (wanted|U\+)"):
        normalise_subject(subject)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule: wanted one of nfkc-casefold, exact, got 'lower'"):
        normalise_subject("a", "lower")
