"""The one call: what it refuses, what it leaves alone, and what its reference methods do where the answer is known."""

from __future__ import annotations

import copy

import pytest
import torch
from small import Adapted, Net, blobs, least_squares, line, linear, trained
from torch import nn

from s3t_ext.approximate import METHODS, Diverged, Guarantee, Records, unlearn
from s3t_ext.approximate.work import join, losses, utility

GONE, KEPT, HELD = blobs(20, seed=1), blobs(80, seed=2), blobs(40, seed=3)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained(join([GONE, KEPT]))


def mean_loss(model: nn.Module, records: Records) -> float:
    with torch.no_grad():
        return float(losses(str(records.task), model(records.inputs), records.labels).mean())


# --- reference methods ---


def test_retraining_finds_the_closed_form_of_the_rest() -> None:
    everything = line(60)
    gone, kept = everything[torch.arange(10)], everything[torch.arange(10, 60)]
    initial = linear(3)
    model = linear(3)
    model.load_state_dict(dict(zip(("weight", "bias"), least_squares(everything), strict=True)))
    result = unlearn("retrain", model, gone, kept, seed=0, initial=initial, epochs=600, batch=50, learning_rate=0.05)
    weight, bias = least_squares(kept)
    assert result.guarantee is Guarantee.EXACT_RETRAIN
    assert (result.model.weight - weight).abs().max() < 1e-3 < (model.weight - weight).abs().max()
    assert (result.model.bias - bias).abs().max() < 1e-3


def test_ascent_takes_the_step_that_a_quadratic_foretells() -> None:
    model = linear(1)
    with torch.no_grad():
        model.bias.fill_(0.5)
    gone = Records(torch.zeros(4, 1), torch.full((4, 1), 0.25))
    model.weight.requires_grad_(False)
    up = unlearn("gradient-ascent", model, gone, seed=0, epochs=1, batch=4, learning_rate=0.125)
    assert up.model.bias.item() == pytest.approx(0.5 + 0.125, abs=1e-6)  # Adam's first: its sign
    kept = Records(torch.zeros(4, 1), torch.full((4, 1), 1.0))
    both = unlearn("neggrad-plus", model, gone, kept, seed=0, alpha=0.75, epochs=1, batch=4, learning_rate=0.5)
    assert both.model.bias.item() == pytest.approx(
        0.5 - 0.5 * (0.75 * 2 * (0.5 - 1) - 0.25 * 2 * (0.5 - 0.25)), abs=1e-6
    )


def test_reference_methods_forget_and_keep(model) -> None:
    up = unlearn("gradient-ascent", model, GONE, seed=0, learning_rate=0.01).model
    assert mean_loss(up, GONE) > 10 * mean_loss(model, GONE)
    on = unlearn("fine-tune", model, GONE, KEPT, seed=0).model
    assert mean_loss(on, KEPT) < mean_loss(model, KEPT)
    plus = unlearn("neggrad-plus", model, GONE, KEPT, seed=0, alpha=0.9, epochs=20).model
    assert mean_loss(plus, GONE) / mean_loss(model, GONE) > mean_loss(plus, KEPT) / mean_loss(model, KEPT)


# --- the call ---


def case(method: str, model: nn.Module) -> tuple[nn.Module, Records, Records | None, dict]:
    """Give a model that fits a method, forgotten and kept records with no more than it needs, and what else it does."""
    chosen, gone, kept, outputs = METHODS[method], GONE, KEPT, 3
    if "classification" not in chosen.tasks:
        everything, outputs = line(300, width=4), 1  # more than a batch of any method
        gone, kept = everything[torch.arange(20)], everything[torch.arange(20, 300)]
        model = trained(everything, Net(4, 16, 1), steps=20)
    extra = {"initial": Net(4, 16, outputs)} if chosen.original == "initial" else {}
    extra |= {"alpha": 1.5} if method == "ssd-label-free" else {}  # by default it changes nothing here
    gone = gone if chosen.labels else Records(gone.inputs)
    return model, gone, (kept if chosen.labels else Records(kept.inputs)) if chosen.retain else None, extra


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_model_given_is_as_it_was_and_a_seed_fixes_every_bit(method, model) -> None:
    chosen, (model, gone, kept, extra) = METHODS[method], case(method, model)
    before = copy.deepcopy(model.state_dict())
    with torch.random.fork_rng():
        torch.manual_seed(7)
        state = torch.get_rng_state()
        a = unlearn(method, model, gone, kept, seed=3, **extra)
        assert torch.equal(torch.get_rng_state(), state)
    b = unlearn(method, model, gone, kept, seed=3, **extra)
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), before.values(), strict=True))
    assert a.model is not model
    assert a.guarantee is chosen.guarantee
    assert all(
        torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    )
    assert a.cost["seconds"] > 0
    assert a.cost["records"] > 0
    other = unlearn(method, model, gone, kept, seed=4, **extra)
    same = all(
        torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    )
    assert same == chosen.deterministic


PROXIES = [("rum", {"proxy": proxy}) for proxy in ("entropy", "holdout-retraining", "loss-curvature")]


@pytest.mark.parametrize(("method", "settings"), [*((name, {}) for name in sorted(METHODS)), *PROXIES])
def test_types_and_devices_are_the_models(method, settings, model) -> None:
    like = torch.zeros((), dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    model, gone, kept, extra = case(method, model)

    def moved(records: Records) -> Records:
        y = records.labels
        return Records(records.inputs.to(like), y if y is None else y.to(like) if y.ndim > 1 else y.to(like.device))

    if "initial" in extra:
        extra["initial"].to(like)
    parts = [moved(gone), None if kept is None else moved(kept)]
    done = unlearn(method, copy.deepcopy(model).to(like), *parts, val=moved(HELD), seed=0, **extra, **settings)
    assert all(p.dtype == like.dtype and p.device == like.device for p in done.model.parameters())


def test_only_the_adapter_changes() -> None:
    model = trained(join([GONE, KEPT]), Adapted(4, 16, 3))
    found = unlearn("fine-tune", model, GONE, KEPT, seed=0).model
    moved = {name for name, p in found.named_parameters() if not torch.equal(p, dict(model.named_parameters())[name])}
    assert moved == {"lora_A", "lora_B"}


@pytest.mark.parametrize(
    ("method", "settings"), [("fine-tune", {"epochs": 10**6}), ("laf", {"density_epochs": 10**6, "epochs": 1})]
)
def test_a_budget_ends_the_promise(method, settings, model) -> None:
    cut = unlearn(method, model, GONE, KEPT, seed=0, budget=0.2, **settings)
    assert cut.guarantee is Guarantee.NONE
    assert "stopped" in cut.trace[-1]
    assert cut.cost["seconds"] < 60


@pytest.mark.parametrize(
    ("method", "settings"), [("fine-tune", {"epochs": 0}), ("ssd", {"alpha": 1e9}), ("retrain", {"epochs": 0})]
)
def test_where_no_weight_changed_nothing_is_promised(method, settings, model) -> None:
    done = unlearn(method, model, GONE, KEPT, seed=0, initial=copy.deepcopy(model), **settings)
    assert done.guarantee is Guarantee.NONE
    assert unlearn("retrain", model, GONE, KEPT, seed=0, initial=Net(4, 16, 3), epochs=0).guarantee is (
        Guarantee.EXACT_RETRAIN
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_before_anything_runs(value, model) -> None:
    def broken(records: Records, part: str) -> Records:
        parts = {"inputs": records.inputs.clone(), "labels": records.labels.clone()}
        parts[part][3, 0] = value
        return Records(**parts)

    everything = line(60, width=4)
    gone, kept, held = everything[torch.arange(10)], everything[torch.arange(10, 50)], everything[torch.arange(50, 60)]
    net = Net(4, 16, 1)
    for name, records in {"forget": gone, "retain": kept, "val": held}.items():
        for part in ("inputs", "labels"):
            given = {"forget": gone, "retain": kept, "val": held} | {name: broken(records, part)}
            with pytest.raises(ValueError, match=f"{name}: expected finite .*, got {value} in the {part} of record 3"):
                unlearn("fine-tune", net, **given, seed=0)
    worse = copy.deepcopy(model)
    worse.head.bias.data[0] = value
    for name, given in {"model": (worse, None), "initial": (model, worse)}.items():
        with pytest.raises(ValueError, match=f"{name}: expected finite weights, got NaN or infinity in head.bias"):
            unlearn("fine-tune", given[0], GONE, KEPT, seed=0, initial=given[1])


def test_types_of_the_parts_are_one() -> None:
    gone, kept = line(10), line(40, seed=1)
    wide = Records(kept.inputs.double(), kept.labels), Records(kept.inputs, kept.labels.double())
    for other, part in zip(wide, ("inputs", "labels"), strict=True):
        for given in ({"retain": other}, {"retain": kept, "val": other}):
            name = list(given)[-1]
            with pytest.raises(ValueError, match=f"{name}: expected {part} of torch.float32, as of forget, got torch"):
                unlearn("fine-tune", linear(3), gone, seed=0, **given)


def test_advice_names_methods_that_fit_what_is_at_hand(model) -> None:
    bare = [Records(part.inputs) for part in (GONE, KEPT)]
    with pytest.raises(ValueError, match=r"retain: laf needs records that are kept, got none$"):
        unlearn("laf", model, bare[0], seed=0)
    with pytest.raises(
        ValueError, match=r"labels: gaussian needs labels .*, got none; \['ssd-label-free'\] need none$"
    ):
        unlearn("gaussian", model, *bare, seed=0)
    with pytest.raises(ValueError, match=r"for regression, not classification; expected one of \['concept-.*'ssd-"):
        unlearn("gaussian", model, GONE, KEPT, seed=0)
    with pytest.raises(ValueError, match=r"need.*none; \['laf', 'ssd-label-free'\] need none$"):
        unlearn("neggrad-plus", model, *bare, seed=0)


def test_parts_are_checked_before_the_first_of_them_runs(model) -> None:
    from s3t_ext.approximate.work import Work

    work = Work(copy.deepcopy(model), GONE, KEPT, "classification", torch.Generator())
    with pytest.raises(ValueError, match="epochs: expected a whole number"):
        METHODS["rum"].run(work, methods=("fine-tune", "fine-tune"), settings=({"epochs": 1}, {"epochs": -1}))
    assert work.cost["steps"] == work.cost["records"] == 0


def test_records_are_told_apart_however_they_are_described() -> None:
    named = Records(GONE.inputs, GONE.labels, tuple(map(str, range(len(GONE)))))
    for forget, retain in ((named, GONE), (Records(GONE.inputs), GONE), (GONE, named)):
        with pytest.raises(ValueError, match="got 20 that are in both sets"):
            unlearn("laf", Net(4, 16, 3), forget, retain, seed=0)
    half = [Records(part.inputs.bfloat16(), part.labels) for part in (GONE, KEPT)]
    assert (half[0].shared(half[0]), half[0].shared(half[1])) == (20, 0)


def test_utility_by_task() -> None:
    flat = line(50, noise=0.0)
    exact = linear(3)
    exact.load_state_dict(dict(zip(("weight", "bias"), least_squares(flat), strict=True)))
    assert utility(exact, flat) == pytest.approx(1, abs=1e-5)
    assert utility(linear(3), flat) < 0.1
    tokens = torch.tensor([[0, 1, 0, 1]])
    turn = nn.Embedding.from_pretrained(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert utility(turn, Records(tokens, torch.tensor([[-100, 1, 0, 0]]))) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "magic"}, "method: expected one of .*'fine-tune'.*, got 'magic'"),
        ({"forget": GONE[torch.arange(0)]}, "forget: expected at least one record"),
        ({"retain": None}, "retain: neggrad-plus needs records that are kept, got none; .*gradient-ascent.* need none"),
        ({"retain": KEPT[torch.arange(0)]}, "retain: neggrad-plus needs records"),
        ({"forget": Records(GONE.inputs)}, "labels: neggrad-plus needs labels of all records"),
        ({"retain": join([KEPT, GONE[torch.arange(2)]])}, "got 2 that are in both sets"),
        ({"retain": line(9, width=4)}, "labels: expected those of one task"),
        ({"alfa": 1}, "alfa: no setting of neggrad-plus; expected some of .*'alpha'"),
        ({"epochs": -1}, "epochs: expected a whole number of at least 0, got -1"),
        ({"epochs": 1.5}, "epochs: expected a whole number"),
        ({"batch": 0}, "batch: expected a whole number of at least 1"),
        ({"learning_rate": -1.0}, "learning_rate: expected a number of at least 0"),
        ({"learning_rate": "x"}, "learning_rate: expected a number, got 'x'"),
        ({"alpha": 2.0}, "alpha: expected a share from 0 to 1"),
        ({"method": "ssd", "lam": -1.0}, "alpha, lam: expected numbers of at least 0"),
        ({"method": "concept-poisoning", "side": 3.0}, "side: expected a share above 0 and at most 1"),
        ({"method": "concept-poisoning", "top": 0}, "top: expected at least 1"),
        ({"method": "prune-first", "settings": {"epochs": "x"}}, "epochs: expected a whole number"),
        ({"val": KEPT[torch.arange(3)]}, "val: expected records that are never trained on, got 3 that are in both"),
        ({"val": GONE[torch.arange(3)]}, "val: expected records that are not to be forgotten, got 3"),
        ({"budget": 0}, "budget: expected more than 0 seconds"),
        ({"method": "retrain"}, "initial: retrain needs the model as it was"),
        ({"initial": Net(4, 5, 3)}, r"initial: expected the model's weights by .*, first.bias \(16,\) .* got \(5,\)"),
        ({"initial": linear(4)}, r"initial: expected the model's weights by .*, bias None for one, got \(1,\)"),
        ({"seed": 2**64}, "seed: expected a whole number of at most 64 bits, got 18446744073709551616"),
        ({"method": "laf", "latent": 0}, "latent: expected a whole number of at least 1, got 0"),
        ({"method": "prune-first", "then": "prune-first"}, "then: expected another method, got 'prune-first'"),
        ({"method": "prune-first", "settings": 5}, "settings: expected those of fine-tune by their names, .*, got 5"),
        ({"method": "rum", "settings": (1, 2, 3)}, "settings: expected those of neggrad-plus by their .*, got 1"),
        ({"method": "rum", "settings": 5}, "settings: expected a list or tuple, got 5"),
    ],
)
def test_what_does_not_fit_is_refused(change, says, model) -> None:
    given = {"method": "neggrad-plus", "forget": GONE, "retain": KEPT, "seed": 0} | change
    method, gone = given.pop("method"), given.pop("forget")
    with pytest.raises(ValueError, match=says):
        unlearn(method, model, gone, given.pop("retain"), **given)


@pytest.mark.parametrize(("what", "settings"), [("loss", {}), ("weights", {"epochs": 1, "batch": 80, "gamma": 1e3})])
def test_divergence_has_a_name(what, settings, model) -> None:
    with pytest.raises(Diverged, match=f"the {what} .* no longer finite"):
        unlearn("l1-sparse", model, GONE, KEPT, seed=0, learning_rate=3e38, **settings)


def test_records_are_checked() -> None:
    with pytest.raises(ValueError, match="labels: expected 3, one for each record, got 2"):
        Records(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels: expected \(n,\) int64"):
        Records(torch.zeros(3, 2), torch.zeros(3))
    names = Records(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), ("a", "b"))
    assert names[torch.tensor([False, True])].names == ("b",)
    twin = Records(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), ("c", "d"))
    unlearn("fine-tune", Net(2, 4, 3), names, twin, seed=0, epochs=1)  # equal by chance, told apart by names
