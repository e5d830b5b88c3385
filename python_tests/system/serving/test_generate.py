"""Writing: a cache and a batch change no token, drawing is a prompt's own, and a deletion on the way begins it anew."""

from __future__ import annotations

import copy
import gc
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import untrained as u
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, TextStreamer

import s3t_ext
from s3t_ext.system.network import Network
from s3t_ext.system.serve import Refused, Service
from s3t_ext.system.serving import writer as writing
from s3t_ext.system.serving.generate import Drawn
from s3t_ext.system.serving.writer import Overtaken, PathCache, Writer

NEW = 6


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3"])
def each(request, tmp_path_factory):
    placement = "layers" if request.param == "llama" else "stack"
    return u.store(tmp_path_factory.mktemp(request.param) / "store", request.param, "causal", placement=placement)


@pytest.fixture
def own(tmp_path):
    return u.store(tmp_path / "store", "llama", "causal", placement="layers")


def prompts(count: int = 5) -> np.ndarray:
    x = u.texts(count, seed=7, longest=12)
    return np.pad(x, ((0, 0), (0, 3)), constant_values=-1)


def step_by_step(service: Service, prompt: np.ndarray, tokens: int = NEW) -> list[int]:
    """Write without any cache: each token by the whole text before it."""
    text = [int(i) for i in prompt if i >= 0]
    start = len(text)
    for _ in range(tokens):
        text.append(int(service.predict(np.array([text])).scores[0].argmax()))
    return text[start:]


def padded(x: np.ndarray) -> dict[str, torch.Tensor]:
    """Pad on the left, as transformers wants prompts."""
    longest = int((x >= 0).sum(1).max())
    rows = [np.concatenate([np.full(longest - (row >= 0).sum(), -1), row[row >= 0]]) for row in x]
    left = torch.from_numpy(np.stack(rows)).long()
    return {"inputs": left.clamp(min=0), "attention_mask": (left >= 0).long()}


GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_greedy_decoding_is_that_of_whole_texts(each) -> None:
    x = prompts()
    with Service(each) as service:
        slow = [step_by_step(service, row) for row in x]
        answer = service.generate(x, NEW)
        assert len({tuple(row) for row in slow}) > 2
        assert [len(row) for row in answer.tokens] == [NEW] * len(x)
        assert answer.tokens == slow
        assert (answer.nodes, answer.depths) == (service._routed.names, (3, 3))
        theirs = Writer(service).generate(**padded(x), **GREEDY)
        assert theirs[:, -NEW:].tolist() == slow
        assert [service.generate(row[None], NEW).tokens[0] for row in x] == slow, "alone as beside others"


def test_the_bits_of_a_step_are_a_prompts_own(each) -> None:
    x = torch.from_numpy(u.texts(40, seed=9, longest=8))
    x = x[(x >= 0).all(1)][:5].long()
    assert len(x) == 5
    with Service(each) as service, torch.inference_mode():
        writer = Writer(service)
        whole = writer(x, use_cache=True)
        more = writer(x[:, :2], attention_mask=torch.ones(5, 10), past_key_values=whole.past_key_values, use_cache=True)
        for k in range(5):
            one = writer(x[k : k + 1], use_cache=True)
            assert torch.equal(one.logits[0], whole.logits[k])
            again = writer(x[k : k + 1, :2], past_key_values=one.past_key_values, use_cache=True)
            assert torch.equal(again.logits[0], more.logits[k])
        at_once = writer(torch.cat([x, x[:, :2]], 1))
        torch.testing.assert_close(at_once.logits[:, -2:], more.logits)
        assert at_once.past_key_values is None
        np.testing.assert_allclose(whole.logits[:, -1].exp(), service.predict(x.numpy()).scores, rtol=1e-4, atol=1e-6)


def test_layers_below_every_adapter_run_once(own, monkeypatch) -> None:
    """And hold their keys and values once; no bit tells."""
    x = torch.from_numpy(u.texts(9, seed=9, longest=8)).long()
    x, mask = x.clamp(min=0), x >= 0
    with Service(own, ensemble="maximal") as service, torch.inference_mode():
        writer, cells = Writer(service), u.people_by_cell(own)
        service.delete([cells[0, 0][0], cells[1, 0][0], cells[0, 1][0], cells[1, 1][0]])
        paths = len(service._routed.served)
        assert service.depths == (1, 1)

        def two_steps() -> tuple[list[torch.Tensor], list[int]]:
            first = writer(x, attention_mask=mask, use_cache=True)
            cache = first.past_key_values
            then = writer(x[:, :1], attention_mask=torch.ones(9, 9), past_key_values=cache, use_cache=True)
            cache.reorder_cache(torch.arange(9))
            return [first.logits, then.logits], [len(layer.keys) for layer in cache.layers]

        shared, rows = two_steps()
        assert rows == [9, 9, 9 * paths]
        monkeypatch.setattr(Network, "trunk", lambda self, depth: 0)
        whole, rows = two_steps()
        assert rows == [9 * paths] * 3
        assert all(map(torch.equal, shared, whole))


def test_beams_take_their_keys_and_values_along(own) -> None:
    """The sum of a beam's log-probabilities, taken step by step from the cache, is that of the whole text."""
    with Service(own, ensemble="maximal") as service:
        writer, x = Writer(service), padded(prompts(3))
        how = {**GREEDY, "num_beams": 3, "length_penalty": 0.0, "return_dict_in_generate": True, "output_scores": True}
        found = writer.generate(**x, **how)
        greedy = writer.generate(**x, **GREEDY)
        mask = torch.cat([x["attention_mask"], torch.ones(3, NEW)], 1)
        with torch.inference_mode():
            sums = [
                writer(texts, attention_mask=mask).logits[:, -NEW - 1 : -1].gather(2, texts[:, -NEW:, None]).sum((1, 2))
                for texts in (found.sequences, greedy)
            ]
        torch.testing.assert_close(found.sequences_scores, sums[0], rtol=1e-4, atol=1e-4)
        assert (sums[0] >= sums[1] - 1e-4).all()
        assert not torch.equal(found.sequences, greedy)


def test_drawing_is_by_prompt_and_seed(own) -> None:
    x = prompts()
    with Service(own) as service:
        drawn = service.generate(x, NEW, temperature=1.5, seed=4).tokens
        assert [service.generate(row[None], NEW, temperature=1.5, seed=4).tokens[0] for row in x] == drawn
        assert service.generate(x, NEW, temperature=1.5, seed=5).tokens != drawn
        assert service.generate(x, NEW, temperature=1e-6).tokens == service.generate(x, NEW).tokens
        torch.manual_seed(0)
        theirs = Writer(service).generate(**padded(x), **{**GREEDY, "do_sample": True, "top_k": 5})
        assert theirs.shape[1] == 12 + NEW


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    logits, temperature, draws = torch.tensor([2.0, 0.0, 1.0, -3.0]), 1.5, 4000
    ids = torch.arange(draws)[:, None]
    processor = Drawn(ids, temperature, seed=0)
    said = processor(ids, logits.expand(draws, -1)).argmax(1).bincount(minlength=4) / draws
    expected = (logits / temperature).softmax(0)
    assert ((said - expected).abs() < 4 * (expected * (1 - expected) / draws).sqrt()).all()


def test_the_largest_number_drawn_does_not_force_its_token(monkeypatch) -> None:
    largest = 0.5 * (1 - 2**-24)
    monkeypatch.setattr("s3t_ext.system.serving.generate.uniform", lambda key, shape, bound: torch.full(shape, largest))
    given = Drawn(torch.zeros(1, 1, dtype=torch.long), 1.0, 0)(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 3))
    assert bool((given < 18).all())  # -log(-log(1 - 2^-25)) = 17.3


def test_an_end_ends_a_text(own) -> None:
    x = prompts()
    with Service(own) as service:
        whole = service.generate(x, NEW).tokens
        file = own / "base" / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": whole[2][3]}))
        cut = service.generate(x, NEW).tokens
    ended = [row[: row.index(whole[2][3])] if whole[2][3] in row else row for row in whole]
    assert cut == ended
    assert len(cut[2]) < NEW


class Meanwhile(LogitsProcessor):
    """Do something at a step."""

    def __init__(self, step: int, do) -> None:
        self.left, self.do, self.calls = step, do, 0

    def __call__(self, input_ids, scores):
        self.left, self.calls = self.left - 1, self.calls + 1
        if self.left == 0:
            self.do()
        return scores


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("step", [1, 4, NEW])
def test_a_deletion_on_the_way_begins_the_answer_anew(own, here, step, monkeypatch) -> None:
    person = u.people_by_cell(own)[0, 0][0]
    seen, left = [], []
    update, wipe = writing._Layer.update, PathCache.wipe

    def watched(self, *args):
        kept = update(self, *args)
        seen.extend(kept)
        return kept

    monkeypatch.setattr(writing._Layer, "update", watched)
    monkeypatch.setattr(PathCache, "wipe", lambda self: (wipe(self), left.append(len(self.layers))))
    x = prompts()
    with Service(own) as service:
        before = service.generate(x, NEW)
        meanwhile = Meanwhile(step, lambda: service.delete([person]) if here else s3t_ext.delete(own, [person]))
        written = Writer(service).generate(**padded(x), **GREEDY, logits_processor=LogitsProcessorList([meanwhile]))
        assert meanwhile.calls > NEW, "begun anew"
        after = service.generate(x, NEW)
    assert written[:, -NEW:].tolist() == after.tokens != before.tokens
    assert (before.depths, after.depths) == ((3, 3), (2, 3))
    assert after.epoch > before.epoch
    assert len(seen) > 50
    assert all(t.isnan().all() for t in seen), "every key and value ever held is overwritten"
    assert set(left) == {0}


def test_a_deletion_while_a_service_writes(own, monkeypatch) -> None:
    """Groups of lengths are written one after the other, all by one route."""
    person, x = u.people_by_cell(own)[1, 1][0], prompts()
    with Service(own) as service:
        attempt, calls = Writer.attempt, []

        def overtaken(self, route, *args, **how):
            written = attempt(self, route, *args, **how)
            calls.append(route)
            if len(calls) == 2:
                s3t_ext.delete(own, [person])
            return written

        monkeypatch.setattr(Writer, "attempt", overtaken)
        answer = service.generate(x, NEW)
        assert len(calls) == 4
        assert calls[0] is calls[1] is not calls[2] is calls[3]
        assert answer.depths == (3, 2)
        assert answer.tokens == service.generate(x, NEW).tokens


def test_when_all_die_on_the_way_nothing_is_said(own) -> None:
    everybody = [names[0] for names in u.people_by_cell(own).values()]
    with Service(own) as service:
        meanwhile = LogitsProcessorList([Meanwhile(2, lambda: service.delete(everybody))])
        with pytest.raises(Refused, match="every shard is dead"):
            Writer(service).generate(**padded(prompts()), **GREEDY, logits_processor=meanwhile)


def test_a_cache_of_dead_nodes_goes_no_further(own, monkeypatch) -> None:
    with Service(own) as service, torch.inference_mode():
        writer, x = Writer(service), torch.tensor([[5, 6, 7]])
        cache = writer(x, use_cache=True).past_key_values
        service.delete([u.people_by_cell(own)[0, 0][0]])
        monkeypatch.setattr(Writer, "_step", None)  # not even begun
        with pytest.raises(Overtaken):
            writer(x[:, :1], past_key_values=cache, use_cache=True)
        assert not cache.layers


@pytest.mark.parametrize("here", [True, False])
def test_a_cache_in_a_callers_hand_dies_with_its_nodes(own, here) -> None:
    """When the deletion is acknowledged, or seen; what rests on other nodes goes on with its bits."""
    first, second, *_ = u.people_by_cell(own)[0, 0]
    with Service(own) as service, torch.inference_mode():
        writer, x = Writer(service), torch.tensor([[5, 6, 7]])

        def held() -> PathCache:
            return writer(x, use_cache=True).past_key_values

        def tensors(cache: PathCache) -> list[torch.Tensor]:
            return [part for layer in cache.layers for part in (layer.keys, layer.values)]

        def forget(person: str) -> None:
            service.delete([person]) if here else (s3t_ext.delete(own, [person]), service.refresh())

        with pytest.raises(ValueError, match="subjects"):
            service.delete([])  # refused: nobody is forgotten
        cache, cropped = held(), held()
        copied, before = copy.deepcopy(cache), [part.clone() for part in tensors(cache)]
        shallow = copy.copy(held())  # outlives what it was copied from
        with pytest.raises(NotImplementedError, match="selects no rows"):
            copied.batch_select_indices(torch.tensor([0]))
        under = tensors(cropped)
        cropped.crop(-2)
        assert all(map(torch.equal, tensors(copied), before))
        forget(first)
        parts = [part for one in (cache, copied, cropped, shallow) for part in tensors(one)] + under
        assert len(parts) == 5 * len(before)
        assert all(bool(part.isnan().all()) for part in parts)
        rest = held()
        expected = writer(x[:, :1], past_key_values=held(), use_cache=True).logits
        forget(second)  # in a slice that nothing rests on any more
        assert torch.equal(writer(x[:, :1], past_key_values=rest, use_cache=True).logits, expected)
        kept = len(service._derived)
        del cache, copied, cropped, shallow
        gc.collect()
        assert len(service._derived) == kept - 4, "watched, not kept"


def test_a_copy_of_a_cache_that_a_request_overtakes_is_overwritten(own, monkeypatch) -> None:
    """The service overwrites what a copy holds when it hears of the request; what is copied later came too late."""
    person = u.people_by_cell(own)[0, 0][0]
    with Service(own) as service, torch.inference_mode():
        cache = Writer(service)(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values

        def overtaken(layers, memo):
            copied = [copy.deepcopy(layer, memo) for layer in layers]
            service.delete([person])
            return copied

        monkeypatch.setattr(writing, "copy", SimpleNamespace(deepcopy=overtaken))
        copied = cache.__deepcopy__({})
        parts = [part for one in (cache, copied) for layer in one.layers for part in (layer.keys, layer.values)]
        assert len(parts) == 4 * len(cache.layers) > 0
        assert all(bool(part.isnan().all()) for part in parts)


def test_what_would_pass_the_check_by_is_refused(own, tmp_path) -> None:
    with Service(own) as service:
        writer, x = Writer(service), padded(prompts())
        with pytest.raises(ValueError, match="streamer: expected none"):
            writer.generate(**x, **GREEDY, streamer=TextStreamer(None))
        with pytest.raises(ValueError, match="use_cache: expected True"):
            writer.generate(**x, **GREEDY, use_cache=False)
        with pytest.raises(ValueError, match="past_key_values: expected None"):
            writer(x["inputs"], past_key_values=DynamicCache())
        for bad, name in (
            ((np.full((1, 3), -1), 2), "prompts"),
            ((prompts(), 99), "tokens"),
            ((prompts(), 0), "tokens"),
        ):
            with pytest.raises(ValueError, match=name):
                service.generate(*bad)
        with pytest.raises(ValueError, match="temperature"):
            service.generate(prompts(), 2, temperature=-1.0)
    store = u.store(tmp_path / "other", "bert", "classification", strategy="sisa")
    with Service(store) as service, pytest.raises(ValueError, match="service: expected one of a causal store"):
        service.generate(prompts(), 2)
