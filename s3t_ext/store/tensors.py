"""Named arrays as bytes: the safetensors file, and a hash that does not depend on its layout."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

import numpy as np
import safetensors.numpy


def weights_hash(tensors: Mapping[str, np.ndarray]) -> str:
    """Hash names, types, shapes and values of arrays.

        sha256(over sorted names: name, dtype, shape, values as raw little-endian bytes in C order)

    Args:
        tensors: arrays of any shape and plain type, strided or not.

    Returns:
        64 hex digits; every field is length-prefixed, so that no two sets of arrays share an input.
    """
    digest = hashlib.sha256(struct.pack("<Q", len(tensors)))
    for name in sorted(tensors):
        array = _plain(tensors[name])
        header = (name.encode(), array.dtype.str.encode(), struct.pack(f"<{array.ndim}Q", *array.shape))
        for field in header:
            digest.update(struct.pack("<Q", len(field)) + field)
        digest.update(struct.pack("<Q", array.nbytes))
        digest.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def _plain(array: np.ndarray) -> np.ndarray:
    """Return the array in C order and little-endian: `safetensors` writes a buffer's bytes as they lie."""
    array = np.asarray(array)
    return array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)


def encode(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Encode arrays as a safetensors file.

    Raises:
        ValueError: a type that safetensors does not hold (objects, strings, dates).
    """
    for name, array in tensors.items():
        if np.asarray(array).dtype.kind not in "fiub":
            raise ValueError(f"tensors: {name!r} wanted numbers or booleans, got type {np.asarray(array).dtype}")
    return safetensors.numpy.save({name: _plain(array) for name, array in tensors.items()})


def decode(data: bytes) -> dict[str, np.ndarray]:
    """Decode a safetensors file.

    Raises:
        ValueError: the bytes are not one.
    """
    try:
        return safetensors.numpy.load(data)
    except Exception as error:  # a damaged header shows as SafetensorError, KeyError, ValueError, ... by what was hit
        raise ValueError(f"not a safetensors file: {error}") from error
