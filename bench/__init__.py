"""The benchmark: ``python -m bench.run --quick`` from the root of the repository.

The root is moved to the end of the search path: an installed s3t_ext then wins over the source tree beside this folder,
which holds no compiled module.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT] + [str(ROOT)]
