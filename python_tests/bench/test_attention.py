"""The benchmark of attention: what is wrong is not timed."""

from __future__ import annotations

import pytest
import torch

from bench import attention
from s3t_ext.lora.kernels import native

pytestmark = pytest.mark.skipif(not native.ATTENDS, reason=native.WHY_NOT or "no kernel")


def test_every_case_has_a_row_of_each_provider() -> None:
    rows = list(attention.measure(0.0, tokens=100))
    assert len({(r["case"], r["provider"]) for r in rows}) == len(rows) == 2 * 2 * 4 * 2
    assert all(float(r["p50"]) > 0 and r["padded"] >= r["tokens"] for r in rows)
    assert {r["padded"] == r["tokens"] for r in rows if not r["case"].endswith("mixed")} == {True}


def test_a_text_that_sees_another_is_found(monkeypatch) -> None:
    def joined(found: attention.Texts):
        return attention.ours(found._replace(starts=found.starts[[0, -1]]))

    monkeypatch.setitem(attention.PROVIDERS, "s3t", joined)
    with pytest.raises(ValueError, match="s3t: expected an error"):
        next(attention.measure(0.0, tokens=100))


@pytest.mark.parametrize("part", range(4))
def test_every_result_is_checked(part) -> None:
    found = attention.texts((3, 5), torch.float32, 40)

    def run(backward: bool) -> list[torch.Tensor]:
        results = attention.ours(found)(backward)
        results[part] = results[part] * 1.01
        return results

    assert attention.error(attention.ours(found), found) < 2e-5 < attention.error(run, found)
