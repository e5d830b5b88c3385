"""Approximate unlearning, one method a file, behind one call: what to hold the exact against. Knows no store."""

from s3t_ext.approximate.methods import METHODS, Method, unlearn
from s3t_ext.approximate.work import Diverged, Guarantee, Records, Result

__all__ = ["METHODS", "Diverged", "Guarantee", "Method", "Records", "Result", "unlearn"]
