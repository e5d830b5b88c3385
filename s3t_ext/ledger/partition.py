"""Placement by subject: removing one record moves no other, and all records of a subject share a slice."""

from __future__ import annotations

from s3t_ext.ledger.identity import Key


def place(key: Key, subject: str, shards: int, slices: int, generation: int = 0) -> tuple[int, int]:
    """Return the (shard, slice) of a subject.

        divmod(HMAC(key/placement, subject) mod (m * L), L)        key/placement <g> in generation g > 0

    Args:
        key: the store's key, drawn once and never re-drawn for balance.
        subject: in normal form.
        shards: m.
        slices: L of each shard.
        generation: each has a key of its own; the shard is counted from its first one.

    Notes:
        All 256 bits of the hash enter the remainder: its bias is below m * L / 2^256.
    """
    if shards < 1 or slices < 1:
        raise ValueError(f"wanted at least one shard and one slice, got {shards} shards of {slices} slices")
    label = f"placement {generation}" if generation else "placement"
    number = int.from_bytes(key.derive(label).mac(subject.encode()), "little")
    return divmod(number % (shards * slices), slices)
