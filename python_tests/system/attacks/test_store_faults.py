"""A failing disk, call by call, below whole operations on a store.

An acknowledgement stands on a synchronised record, what is marked erased is gone, and the store opens after. The counts
are printed (`pytest -rP`). A sample of the calls; S3T_LONG=1 visits every call with every kind of fault, 12 minutes.
"""

import pytest

from .test_kills import LONG, SEED, run

PLACES = {"delete": 12, "erase": 8, "publish": 6, "rotate": 8, "backup": 8, "restore": 8, "heal": 6, "grow": 6}


@pytest.mark.parametrize("operation", PLACES)
def test_a_fault_at_any_call_leaves_the_store_whole(library, ram, monkeypatch, operation):
    monkeypatch.setenv("LD_PRELOAD", str(library))
    places = 0 if LONG else PLACES[operation]
    seen = run("faults_store.py", library, ram, operation, places, SEED)
    for kind, counts in seen.items():
        print(f"{operation}, {kind}: {counts}")
        assert counts["visited"] == (places or counts["calls"])
        assert kind == "EINTR once" or counts["refused"] > counts["visited"] // 2
        assert not ("lasting" in kind and counts["acknowledged after a fault"])
