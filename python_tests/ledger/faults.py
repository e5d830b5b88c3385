"""Run with `faults.c` preloaded: of the calls of a deletion that change a file the n-th fails, for n = 1, 2, ...

Arguments: the compiled library, an empty folder, the error ("0" kills), "lasting" or "once". It ends with the first
clean run and prints the counts as JSON; an assertion fails where an acknowledged request is not in ledger and anchor.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from s3t_ext.ledger import Holding, Ledger, LedgerError
from s3t_ext.ledger.anchor import Anchor

CELLS = [(0, 0), (0, 1)]
OLD, NEW = "a" * 64, "b" * 64
ACKNOWLEDGED, REFUSED = 0, 3


def delete(faults, path, nth, error, lasting):
    """Make the request as a new process does, under the n-th fault; return how it ended."""
    faults.faults_arm(nth, error, lasting)
    try:
        with Ledger.open(path) as ledger:
            try:
                ledger.delete("new", [NEW], lambda applied: {"seq": applied.seq})
                ended = ACKNOWLEDGED
            except LedgerError:
                ended = REFUSED
            fired = faults.faults_disarm()
            if ended == REFUSED:
                try:
                    ledger.delete("later", [NEW], lambda applied: {"seq": applied.seq})
                    return 4  # after a failure, before it was opened again
                except LedgerError:
                    pass
            anchored = Anchor(path.with_name("anchor")).read()
            if ended == ACKNOWLEDGED and (anchored is None or anchored.count < 4):
                return 5
    except LedgerError:
        ended, fired = REFUSED, faults.faults_disarm()
    return ended + (10 if fired else 0)


def main(library, folder, error, lasting):
    faults, folder = ctypes.CDLL(library), Path(folder)
    (folder / "whole").mkdir()
    with Ledger.create(folder / "whole" / "ledger.db", {}) as ledger:
        ledger.ingest(dict.fromkeys(CELLS, "0" * 64), [Holding(OLD, *CELLS[0]), Holding(NEW, *CELLS[1])])
        ledger.delete("old", [OLD], lambda applied: {"seq": applied.seq})
    counts = {"calls": 0, "acknowledged": 0, "refused": 0, "killed": 0, "acknowledged_after_a_fault": []}
    path, nth = folder / "store" / "ledger.db", 1
    while True:
        shutil.copytree(folder / "whole", path.parent)
        child = os.fork()
        if child == 0:
            os._exit(delete(faults, path, nth, error, lasting))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 3, 10, 13, -signal.SIGKILL), (nth, status)
        with Ledger.open(path) as ledger:
            requests = {row.request_id for row in ledger.requests()}
            assert "old" in requests, nth
            assert CELLS[0] in ledger.dirty(), nth
            assert status not in (0, 10) or ("new" in requests and ledger.dirty() == set(CELLS)), nth
            assert ledger.delete("new", [NEW], lambda applied: {"seq": applied.seq}) == {"seq": 4}, nth
        assert Anchor(path.with_name("anchor")).read().count == 4
        shutil.rmtree(path.parent)
        counts["acknowledged"] += status in (0, 10)
        counts["refused"] += status in (3, 13)
        counts["killed"] += status == -signal.SIGKILL
        counts["acknowledged_after_a_fault"] += [nth] * (status == 10)
        counts["calls"] = nth
        if status == 0:
            return counts
        nth += 1


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "lasting")))
