"""Rule 8: a record's features and a node's gradients have the same bits alone and in any company."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_models
import torch

from s3t_ext.models.batches import by_length
from s3t_ext.models.folder import build, load_model

CASES = [(family, "") for family in tiny_models.FAMILIES] + [("gpt2", "ForCausalLM"), ("llama", "ForCausalLM")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
@pytest.mark.parametrize(("family", "task"), [*CASES, ("built-in", "vit"), ("built-in", "mlp")])
@pytest.mark.parametrize("layout", ["as it is", "padded"])
def test_company_changes_no_bit(family, task, dtype, layout, folder, monkeypatch) -> None:
    model = build(task, {}).eval() if family == "built-in" else load_model(folder(family, task))
    if layout == "padded":
        if not model.vocabulary:
            pytest.skip("one layout for images")
        monkeypatch.setattr(model, "_unpads", False)
    adapted = tiny_models.Adapted(model, nodes=5, dtype=dtype)
    x = tiny_models.records(model, 23)
    weights = torch.randn(23, model.features)
    wide = torch.nn.functional.pad(x, (0, 3), value=-1) if model.vocabulary else x
    mine = [2, 0, 5]  # of node 3: texts of 1 and 8 tokens among them
    alone, gradients = adapted.run(x, weights, [3], [mine])
    assert all(g.any() for g in gradients), "every adapter has a part in the features"
    companies = (
        ([3, 1], [mine, [1]]),
        ([1, 3], [[1, 4, 7, 8, 9], mine]),
        ([0, 1, 3, 4], [list(range(6, 17)), [1], mine, [3, 4]]),
        ([4, 2, 0, 1, 3], [[], [17], [], list(range(18, 23)), mine]),
    )
    for nodes, rows in companies:
        out, others = adapted.run(x, weights, nodes, rows)
        start = sum(map(len, rows[: nodes.index(3)]))
        for own, there in zip(alone, out[start : start + 3], strict=True):
            assert torch.equal(own, there)
        for own, there in zip(gradients, others, strict=True):
            assert torch.equal(own[0], there[nodes.index(3)])
    if layout == "as it is":
        for own, there in zip(alone, adapted.run(wide, weights, [3], [mine])[0], strict=True):
            same = torch.equal(own, there[: len(own)])
            assert same, "how wide the batch is padded has no say"
    for k, row in enumerate(mine):
        single, _ = adapted.run(x, weights, [3], [[row]])
        assert torch.equal(single[0], alone[k])


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit"])
def test_threads_with_a_copy_each_cut_where_they_like(family, folder) -> None:
    model = load_model(folder(family))
    x = tiny_models.records(model, 12)
    parts = [part for _, part in by_length(x)]
    copies = [copy.deepcopy(model, {id(t): t for t in model.parameters()}) for _ in range(3)]
    assert next(copies[0].parameters()) is next(model.parameters()), "one copy of the weights"

    def run(lane: int) -> bool:
        own, same = copies[lane], True
        for _ in range(15):
            for part in parts:
                same &= torch.equal(own.above(own.below(part, lane), part, lane), own(part))
        return same

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(run, range(3)))
    assert all(torch.equal(own(part), model(part)) for own in copies for part in parts)
