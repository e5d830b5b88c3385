"""Receipts: one row for each place of each subject, in plain JSON."""

import json

from s3t_ext.ledger import PROMISE, ShardChange, receipts

from .conftest import SUBJECTS, UNKNOWN


def statuses(receipt):
    return [(row["subject"], row["status"], row["part"], row["shard"], row["slice"]) for row in receipt["subjects"]]


def test_a_receipt_says_what_was_done(ledger):
    change = ShardChange(0, ["d" * 64], [{"node": "k" * 64, "slices": ["1" * 64]}], 2, 1)
    wanted = [SUBJECTS[0], UNKNOWN, "e" * 64]
    receipt = ledger.delete("r1", wanted, lambda a: receipts.build(a, [change]), "2030-01-01T00:00:00.000+00:00")
    assert json.loads(json.dumps(receipt)) == receipt
    assert set(receipt) == {
        "format", "request_id", "request_hash", "ledger", "received", "applied", "deadline", "subjects", "shards",
        "exports", "promise"
    }  # fmt: skip
    assert statuses(receipt) == [
        (SUBJECTS[0], "deleted", "private", 0, 0),
        (SUBJECTS[0], "held in a declared part, not covered", "public", None, None),
        ("e" * 64, "held in a declared part, not covered", "evaluation", None, None),
        (UNKNOWN, "not held", None, None, None),
    ]
    assert receipt["shards"] == [
        {
            "shard": 0,
            "dead": ["d" * 64],
            "kept": [{"node": "k" * 64, "slices": ["1" * 64]}],
            "depth_before": 2,
            "depth_after": 1,
            "untrained": [],
        }
    ]
    assert (receipt["received"], receipt["promise"]) == ("2030-01-01T00:00:00.000+00:00", PROMISE)


def test_a_second_request_says_already_deleted(ledger):
    def build(applied):
        return receipts.build(applied, [])

    first = ledger.delete("r1", [SUBJECTS[1]], build)
    second = ledger.delete("r2", [SUBJECTS[1]], build)
    assert statuses(second) == [(SUBJECTS[1], "already deleted", "private", 0, 1)]
    assert first["request_hash"] != second["request_hash"]
    assert second["ledger"]["seq"] == first["ledger"]["seq"] + 1
    assert first["ledger"]["previous"] != second["ledger"]["previous"]
