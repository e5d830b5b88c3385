"""Trained nodes by content address: the weights in a sealed safetensors blob, identity and provenance in a manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from s3t_ext.store.files import StoreError, canonical_json, destroy, exists, read_checked, system_errors, write_checked
from s3t_ext.store.sealed import SealedFiles
from s3t_ext.store.tensors import decode, encode, weights_hash


class NodeStore:
    """Nodes in the folder `nodes`, each at the SHA-256 of its canonical identity.

    A node is there once its manifest is: the blob is written first, the manifest last.
    Nodes are found by address only, never by listing the folder.
    """

    def __init__(self, files: SealedFiles) -> None:
        self.files, self.folder = files, files.root / "nodes"

    def put(self, identity: Mapping[str, Any], tensors: Mapping[str, np.ndarray], provenance: Mapping[str, Any]) -> str:
        """Store a node durably and return its id; a second call with the same weights changes nothing.

        Args:
            identity: what defines the result (method.md, rule 2), plain JSON types.
            tensors: the weights.
            provenance: what may not change the result but is needed to compare it: versions, device, threads, ...

        Raises:
            StoreError: it cannot be written, or this identity is stored with other weights.
        """
        node = address(identity)
        weights = weights_hash(tensors)
        if self.has(node):
            stored = self.manifest(node)["weights"]
            if stored != weights:
                raise StoreError(
                    f"node {node} is stored with weights {stored[:12]}, now trained to {weights[:12]}: "
                    "training was not reproducible; run `verify` where the store was trained"
                )
            return node
        blob, manifest = self._paths(node)
        with system_errors("create", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.files.write(blob, encode(tensors), destroy_old=True)  # of a run that was killed before the manifest
        body = {"id": node, "identity": dict(identity), "weights": weights, "provenance": dict(provenance)}
        write_checked(manifest, body)
        return node

    def has(self, node: str) -> bool:
        """Return whether the node is stored, manifest and all; its bytes are checked by `get`."""
        return exists(self._paths(node)[1])

    def remains(self, node: str) -> bool:
        """Return whether anything of the node is there: its manifest, or the bytes of one that a kill cut short."""
        return any(map(exists, self._paths(node)))

    def manifest(self, node: str) -> dict[str, Any]:
        """Return id, identity, weights (their hash) and provenance of a node.

        Raises:
            StoreError: the manifest is missing, damaged, of another format, or belongs to another node.
        """
        path = self._paths(node)[1]
        manifest: dict[str, Any] = read_checked(path)
        described = address(manifest["identity"])
        if described != node or manifest["id"] != node:
            raise StoreError(f"{path} describes node {described}, not {node}; restore it from a backup")
        return manifest

    def get(self, node: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return manifest and weights of a node, the weights checked against the manifest's hash.

        Raises:
            StoreError: the node is missing or damaged; the message names it.
        """
        manifest = self.manifest(node)
        blob = self._paths(node)[0]
        _ = self.files.key  # whose errors are its own: they say nothing of this node
        try:
            tensors = decode(self.files.read(blob))
        except StoreError as error:
            raise StoreError(
                f"{error}; or remove {blob.name} and {node}.json beside it: then the rest serves, and `s3t fit` and "
                "`s3t heal` train it again"
            ) from error
        if weights_hash(tensors) != manifest["weights"]:
            raise StoreError(f"node {node} is damaged: {blob} does not match its manifest; restore or retrain it")
        return manifest, tensors

    def erase(self, node: str) -> None:
        """Overwrite and unlink the node's blob and manifest, durably; a node that is not there is fine."""
        blob, manifest = self._paths(node)
        destroy(blob)  # first: from here on nothing of its weights can be read, whatever a crash leaves
        destroy(manifest)

    def _paths(self, node: str) -> tuple[Path, Path]:
        if len(node) != 64 or not set(node) <= set("0123456789abcdef"):
            raise ValueError(f"node: wanted 64 hex digits, got {node!r}")
        return self.folder / f"{node}.sealed", self.folder / f"{node}.json"


def address(identity: Mapping[str, Any]) -> str:
    """Return the content address of an identity, sha256(canonical JSON), as 64 hex digits."""
    return hashlib.sha256(canonical_json(dict(identity))).hexdigest()
