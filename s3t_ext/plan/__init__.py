"""Plans: which stages a shard trains, and how long they last under deletions. No torch here."""

from s3t_ext.plan.depth import Estimate, expected_depth, ideal
from s3t_ext.plan.greedy import objective
from s3t_ext.plan.matching import bms
from s3t_ext.plan.prior import check_prior, prior_of, read_history
from s3t_ext.plan.strategies import (
    BUDGETED,
    PRICED,
    STRATEGIES,
    WEIGHED,
    build,
    conditional,
    random,
    rotation,
    sisa,
    subsets,
)
from s3t_ext.plan.theory import Moments, death, last_death, survival
from s3t_ext.plan.tree import Node, NodePath, StageTree

__all__ = [
    "BUDGETED",
    "PRICED",
    "STRATEGIES",
    "WEIGHED",
    "Estimate",
    "Moments",
    "Node",
    "NodePath",
    "StageTree",
    "bms",
    "build",
    "check_prior",
    "conditional",
    "death",
    "expected_depth",
    "ideal",
    "last_death",
    "objective",
    "prior_of",
    "random",
    "read_history",
    "rotation",
    "sisa",
    "subsets",
    "survival",
]
