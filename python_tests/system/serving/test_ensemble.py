"""What a service computes, over all tasks and models: each path's own model, the trunk once, bits of a record alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import untrained as u

from s3t_ext.lora.pinned import pinned
from s3t_ext.models.base import BaseModel
from s3t_ext.models.batches import by_length
from s3t_ext.system.serve import Service

CASES = (
    ("bert", "classification", "stack", "float32"),
    ("bert", "classification", "layers", "bfloat16"),
    ("bert", "regression", "layers", "float32"),
    ("vit", "image", "layers", "float32"),
    ("llama", "causal", "layers", "float32"),
    ("gpt2", "causal", "stack", "bfloat16"),
)


def inputs(task: str, count: int = 7) -> np.ndarray:
    if task == "image":
        return np.random.default_rng(3).normal(size=(count, 1, 12, 12)).astype(np.float32)
    return u.texts(count, seed=3)


def alone(service: Service, row: torch.Tensor, x: np.ndarray) -> torch.Tensor:
    """Run one path's model on one record, whole, without any batch beside it."""
    ((_, part),) = by_length(torch.from_numpy(x[None]))
    network = service.network
    with torch.inference_mode(), pinned(), network.routing.batch([1], row[None]):
        features = network.features(part)
        return network.answer(features[:, int((part >= 0).sum()) - 1] if network.base.causal else features)[0]


@pytest.mark.parametrize(("family", "task", "placement", "precision"), CASES)
def test_answers_are_those_of_each_paths_own_model(family, task, placement, precision, tmp_path, monkeypatch) -> None:
    store = u.store(tmp_path / "store", family, task, placement=placement, precision=precision)
    x, forwards = inputs(task), []
    below = BaseModel.below
    monkeypatch.setattr(
        BaseModel, "below", lambda self, y, block: (forwards.append((len(y), block)), below(self, y, block))[1]
    )
    with Service(store, ensemble="maximal") as service:
        service.delete([u.people_by_cell(store)[1, 0][0]])
        answer, route = service.predict(x), service._routed
        assert answer.depths == (3, 2)
        assert forwards == [], "at depth 3 of 3 every layer has an adapter"
        service.delete([u.people_by_cell(store)[0, 2][0]])
        answer, route = service.predict(x), service._routed
        assert answer.depths == (2, 2)
        trunks = sum(n for n, _ in forwards)
        assert (trunks, {block for _, block in forwards}) == ((len(x), {1}) if placement == "layers" else (0, set()))
        assert len(route.table) > 2
        for i, record in enumerate(x):
            total = torch.zeros(answer.scores.shape[1])
            for row, path in zip(route.table, route.served, strict=True):
                y = alone(service, row, record)
                total += (y if task == "regression" else y.softmax(-1)) * path.weight
            if task == "regression":
                total = torch.stack([total[0] / 0.5 + 5.0, total[1] / 2.0 - 1.0])
            assert answer.scores[i].tobytes() == total.numpy().tobytes()
        for rows in ([3], [4, 0], [2, 5, 6]):
            assert service.predict(x[rows]).scores.tobytes() == answer.scores[rows].tobytes()
        if task in ("classification", "image"):
            assert answer.labels == [service.folder.schema.classes[i] for i in answer.scores.argmax(1)]
        else:
            assert answer.labels == []


def test_a_text_is_the_same_in_fewer_columns_and_in_parts(tmp_path, monkeypatch) -> None:
    store = u.store(tmp_path / "store", "bert", "classification")
    x = u.texts(9, seed=5)
    x[3, 5:] = -1
    with Service(store) as service:
        whole = service.predict(x).scores
        assert service.predict(x[3:4, :5]).scores.tobytes() == whole[3].tobytes()
        assert service.predict(x[3:4].astype(np.int64)).scores.tobytes() == whole[3].tobytes()
        assert np.isfinite(service.predict(np.full((2, 3), -1)).scores).all(), "an empty text is one token"
        monkeypatch.setattr("s3t_ext.system.serving.ensemble.TOKENS", 48)
        assert service.predict(x).scores.tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 3), np.float32),
        np.zeros(4, np.int64),
        np.zeros((0, 4), np.int64),
        np.zeros((1, u.LENGTH + 1), np.int64),
        np.full((1, 3), 97),
        np.full((1, 3), -2),
        np.array([[5, -1, 5]]),
    ],
    ids=["floats", "flat", "none", "long", "unknown", "below", "hole"],
)
def test_what_is_no_text_is_refused(tmp_path_factory, bad) -> None:
    store = tmp_path_factory.getbasetemp() / "text" / "store"
    if not store.exists():
        u.store(store, "bert", "classification", strategy="sisa")
    with Service(store) as service, pytest.raises(ValueError, match="inputs: expected token ids below 97"):
        service.predict(bad)
