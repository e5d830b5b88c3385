"""Whole models: every provider's output is held against fp64, and a rate counts the tokens of its part."""

from __future__ import annotations

import copy
import csv

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import s3t_ext
from bench import end_to_end
from bench.built import Cannot
from bench.measure import Log
from bench.rows import read

NAMES = {"bare", "bare-onednn", "peft", "cat", "onednn", "ours-exact", "ours-fast"}


@pytest.fixture
def short(monkeypatch) -> None:
    """One layer, few tokens, always the same ones, and nothing compiled."""
    torch.manual_seed(0)  # of so few, one draw in some puts a right provider past twice torch's own error
    monkeypatch.setattr(end_to_end, "LAYERS", 1)
    monkeypatch.setattr(end_to_end, "PROMPT", 4)
    monkeypatch.setattr(end_to_end, "MORE", 2)
    whole = end_to_end.encoder
    monkeypatch.setattr(end_to_end, "encoder", lambda batch: whole(batch)._replace(compiles=False))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_provider_is_right(dtype, short) -> None:
    log = Log()
    for work, parts in (
        (end_to_end.encoder(2), {"encoder-B2-L4": 8}),
        (end_to_end.decoder(2), {"prefill-B2-L4": 8, "decode-B2-L2": 4}),
    ):
        assert work.tokens == parts
        with torch.no_grad():
            rows = list(end_to_end.measure(work, end_to_end.draw(work, dtype), 1, log))
        assert {(row["case"], row["provider"]) for row in rows} == {(f"{p}-{dtype}", n) for p in parts for n in NAMES}
        assert {row["repeats"] for row in rows} == {1}
    assert not log.failures


def test_a_wrong_model_is_not_timed(monkeypatch, short, tmp_path, capsys) -> None:
    """One adapter of four less, in every layer; the others' rows are written and read back."""
    convert = s3t_ext.from_peft

    def spoilt(model, mode):
        converted = convert(model, mode=mode)
        converted.activate(*converted.adapters[: 3 if mode == "fast" else 4])
        return converted

    monkeypatch.setattr(s3t_ext, "from_peft", spoilt)
    monkeypatch.setattr(end_to_end, "decoder", lambda batch: end_to_end.encoder(batch))
    assert end_to_end.main(["--timers", "all", "--types", "fp32", "--rounds", "1", "--out", str(tmp_path)]) == 1
    assert "NOT TIMED: ours-fast on encoder-B8-L4-fp32: " in capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    found = read(path)
    assert {name for _, name in found.tokens} == NAMES - {"ours-fast"}
    assert {case for case, _ in found.tokens} == {"encoder-B8-L4-fp32-all", "encoder-B1-L4-fp32-all"}
    assert not found.times
    with path.open(newline="") as lines:
        assert next(csv.DictReader(lines))["command"].startswith("python -m bench.end_to_end")


def test_the_concatenated_adapter_is_the_active_one(short) -> None:
    model = end_to_end.concatenated(end_to_end.with_peft(end_to_end.encoder(1).build()))
    assert model.active_adapters == ["cat"]
    assert {len(p) for n, p in model.named_parameters() if "lora_A.cat" in n} == {64}


def test_a_rate_is_of_tokens(monkeypatch, short) -> None:
    """Ten tokens in half a second."""
    work = end_to_end.encoder(1)

    def run(model):
        return torch.zeros(1), {"part": 0.5}

    work = work._replace(run=run, tokens={"part": 10})
    model = end_to_end.Model("fp32", None, None, {"bare": (torch.zeros(1), torch.zeros(1))})
    monkeypatch.setattr(end_to_end, "providers", lambda *_: iter([("bare", lambda: None)]))
    (row,) = end_to_end.measure(work, model, 3, Log())
    assert (row["p20"], row["p50"], row["p80"], row["repeats"]) == ("20.00", "20.00", "20.00", 3)


def test_steady_times_need_fewer_rounds(monkeypatch, short) -> None:
    """As many as percentiles need; all rounds where one provider's are far apart."""
    work, zero = end_to_end.encoder(1), torch.zeros(1)
    model = end_to_end.Model("fp32", None, None, {"bare": (zero, zero)})
    monkeypatch.setattr(end_to_end, "providers", lambda *_: ((f"bare{n}", lambda n=n: n) for n in (1, 2)))
    for noise, expected in ((0.0, end_to_end.LEAST), (0.2, 9)):
        turns = {1: 0, 2: 0}

        def run(n, noise=noise, turns=turns):
            turns[n] += 1
            return zero, {"part": 1.0 + noise * (n == 2 and turns[n] % 2)}

        rows = end_to_end.measure(work._replace(run=run, tokens={"part": 10}), model, 9, Log())
        assert {row["repeats"] for row in rows} == {expected}


def test_every_linear_layer_is_packed(short) -> None:
    """Each then does three products, two of them of the adapters."""
    from torch import nn

    work = end_to_end.decoder(1)
    base = work.build().eval().requires_grad_(False)
    layers = sum(isinstance(m, nn.Linear) for m in base.modules())
    made = dict(end_to_end.providers(work, base, end_to_end.with_peft(copy.deepcopy(base))))
    for name, products in (("bare-onednn", layers), ("onednn", 3 * layers)):
        model = made[name]()
        assert not [m for m in model.modules() if isinstance(m, nn.Linear)]
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
        assert sum(event.name == "mkldnn::_linear_pointwise" for event in profile.events()) == products


def test_what_a_build_of_torch_lacks_is_declined(monkeypatch, short) -> None:
    def lacking(*_):
        raise Cannot("no oneDNN")

    monkeypatch.setattr(end_to_end, "packed", lacking)
    work, log = end_to_end.encoder(1), Log()
    with torch.no_grad():
        assert {*end_to_end.right(work, end_to_end.draw(work, "fp32"), log)} == {n for n in NAMES if "onednn" not in n}
    assert log.declined == {("bare-onednn", "no oneDNN"): 1, ("onednn", "no oneDNN"): 1}
    assert not log.failures
