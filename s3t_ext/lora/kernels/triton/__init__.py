"""Triton kernels, one op a file; ``entry`` has the functions that the table of backends lists.

They are taken from here when that table is made. Later the names mean the files: importing one sets its name here.
"""

from s3t_ext.lora.kernels.triton.entry import AVAILABLE, WHY_NOT, expand_, layer, linear, outer, serves, shrink

__all__ = ["AVAILABLE", "WHY_NOT", "expand_", "layer", "linear", "outer", "serves", "shrink"]
