"""The benchmark lies beside the package, not in it: the root of the repository is searched last."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
