"""Plans: which stages a shard trains, and how long they last under deletions. No torch here."""

from s3t_ext.plan.depth import Estimate, expected_depth, ideal
from s3t_ext.plan.strategies import STRATEGIES, build, rotation, sisa, subsets
from s3t_ext.plan.theory import first_death, last_death
from s3t_ext.plan.tree import Path, StageTree

__all__ = [
    "STRATEGIES",
    "Estimate",
    "Path",
    "StageTree",
    "build",
    "expected_depth",
    "first_death",
    "ideal",
    "last_death",
    "rotation",
    "sisa",
    "subsets",
]
