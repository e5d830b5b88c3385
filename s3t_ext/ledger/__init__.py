"""The books: who is where, what was deleted, what may still serve. No torch here."""

from s3t_ext.ledger.errors import LedgerError
from s3t_ext.ledger.fence import Fence
from s3t_ext.ledger.holding import Holding
from s3t_ext.ledger.identity import (
    Key,
    canonical_json,
    commitment,
    node_identity,
    normalise_subject,
    record_key,
    slice_digest,
    subject_hash,
)
from s3t_ext.ledger.ledger import Ledger
from s3t_ext.ledger.log import Export, Request
from s3t_ext.ledger.partition import place
from s3t_ext.ledger.receipts import PROMISE, Applied, ShardChange

__all__ = [
    "PROMISE",
    "Applied",
    "Export",
    "Fence",
    "Holding",
    "Key",
    "Ledger",
    "LedgerError",
    "Request",
    "ShardChange",
    "canonical_json",
    "commitment",
    "node_identity",
    "normalise_subject",
    "place",
    "record_key",
    "slice_digest",
    "subject_hash",
]
