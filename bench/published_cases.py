"""What is claimed in print of each method, and by which comparison it counts as reproduced.

A published figure stands here only where its text could be read; ``UNREAD`` says where it could not. Figures that were
read elsewhere than in the paper or from its authors are marked second-hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bench.published_measures import IMAGES, SINGLE, Found, World
from s3t_ext.approximate.memorisation import PROXIES

UNREAD = "not given: the table could not be read"
YES, PARTLY, NO = "yes", "in part", "no"


class Check(NamedTuple):
    """A comparison of two measured numbers, or of one with a constant: ``value >= other + slack`` or ``<=``."""

    value: str
    sign: str
    other: str | float
    slack: float = 0.0

    def holds(self, found: Found) -> bool:
        bound = (found[self.other] if isinstance(self.other, str) else self.other) + self.slack
        return found[self.value] >= bound if self.sign == ">=" else found[self.value] <= bound

    def __str__(self) -> str:
        slack = f" {'-' if self.slack < 0 else '+'} {abs(self.slack):g}" if self.slack else ""
        return f"{self.value} {self.sign} {self.other}{slack}"


@dataclass(frozen=True)
class Case:
    """A method or a proxy, and one claim of it.

    Args:
        there, published: setting and figure as published; ``here``: ours.
        figure: the measured number that stands beside the published one.
        checks: the claim itself first; what it must not cost after it.
    """

    method: str
    claim: str
    source: str
    there: str
    published: str
    here: str
    figure: str
    measure: Callable[[World], Found]
    checks: tuple[Check, ...]


def verdict(case: Case, found: Sequence[Found]) -> str:
    """Say whether a claim is reproduced: yes if all checks hold for all seeds, no if the first holds for none."""
    held = [[check.holds(one) for one in found] for check in case.checks]
    if all(map(all, held)):
        return YES
    return PARTLY if any(held[0]) else NO


# --- removal of a class ----------------------------------------------------------------------------------------------

CIFAR = "CIFAR-10, ResNet-18, a class"
CLASS = f"MNIST, {IMAGES} images, CNN, class 0 of 10; accuracy on test images of the class"
SPARSE = "arXiv 2304.04934 (NeurIPS 2023)"
REMOVED = (Check("forget", "<=", 0.05), Check("rest", ">=", "before", -0.05))
SGD = {"gamma": 0.0}  # l1-sparse without its norm: fine-tuning by the same steps
WEAK = {"epochs": 5, "learning_rate": 1e-4}
LAF = {"latent": 8, "epochs": 20, "batch": 8, "unlearning_rate": 2e-4, "alignment_rate": 4e-4}
LAF_HERE = f"{CLASS}; a twentieth of the data: rates four times theirs, batches of 8"


def _less(plain: Found, found: Found) -> Found:
    """Put beside a removal how much less it leaves of the class than another."""
    return found | {"gain": plain["forget"] - found["forget"], "plain": plain["forget"]}


def _pruned(world: World) -> Found:
    return _less(world.removed("fine-tune", **WEAK), world.removed("prune-first", settings=WEAK))


CLASSES = (
    Case(
        "fine-tune", "leaves a part of a class that retraining would not know (0.00), and harms nothing",
        f"{SPARSE}, baseline", f"{CIFAR}, 10 epochs", UNREAD, f"{CLASS}; 5 epochs of Adam at 1e-3",
        "forget", lambda world: world.removed("fine-tune"),
        (Check("forget", ">=", 0.05), Check("rest", ">=", "before", -0.03)),
    ),
    Case(
        "gradient-ascent", "forgets a class, and harms the rest",
        "arXiv 2302.09880 (NeurIPS 2023), baseline", f"{CIFAR}, 5 epochs at 1e-4", UNREAD, CLASS,
        "forget", lambda world: world.removed("gradient-ascent"),
        (Check("forget", "<=", 0.05), Check("rest", "<=", "before", -0.02)),
    ),
    Case(
        "neggrad-plus", "forgets a class, and keeps the rest",
        "arXiv 2302.09880 (NeurIPS 2023); figure: model card Yurim0507/AdvNegGrad", f"{CIFAR}, each of ten",
        "0.00; rest 0.91-0.93 of 0.95 (second-hand)", CLASS,
        "forget", lambda world: world.removed("neggrad-plus"), REMOVED,
    ),
    Case(
        "laf", "forgets a class without labels, and keeps the rest",
        "arXiv 2404.00506 (ICLR 2024), class removal", "MNIST, CNN, class 0", UNREAD, LAF_HERE,
        "forget", lambda world: world.removed("laf", **LAF),
        (Check("forget", "<=", 0.10), Check("rest", ">=", "before", -0.05)),
    ),
    Case(
        "laf-repair", "a short supervised repair gives the rest back",
        "arXiv 2404.00506 (ICLR 2024), LAF+R", "MNIST, CNN, class 0", UNREAD, LAF_HERE,
        "rest", lambda world: world.removed("laf-repair", **LAF),
        (Check("rest", ">=", "before"), Check("forget", "<=", 0.10)),
    ),
    Case(
        "concept-poisoning", "forgets a class, and keeps the rest",
        "arXiv 2405.15662, Table 1, and the authors' rerun (ChangWenhan/Concept_Inference_Unlearn_official)",
        "CIFAR-10, ResNet-50, class deer",
        "0.02-0.07, rest 0.96-0.97; in the rerun 0.00 for each of ten classes, rest 0.966", CLASS,
        "forget", lambda world: world.removed("concept-poisoning"),
        (Check("forget", "<=", 0.07), Check("rest", ">=", "before", -0.03)),
    ),
    Case(
        "ssd", "forgets a class by dampening alone, and keeps the rest",
        "arXiv 2308.07707 (AAAI 2024); figure: model card Yurim0507/Selective_Synapse_Dampening",
        f"{CIFAR}, each of ten, alpha 10",
        "8 of 10 classes: all forgotten (0.00), rest 0.83-0.95 of 0.95, but 0.13 and 0.18 for two (second-hand)",
        f"MNIST, {IMAGES} images, CNN, each class, alpha 10: classes at 0.05 or less with the rest within 0.12",
        "works", lambda world: world.dampened("ssd"),
        (Check("works", ">=", 1), Check("works", ">=", 8), Check("forgotten", ">=", 10)),
    ),
    Case(
        "ssd-label-free", "as SSD, without labels",
        "arXiv 2402.19308 (ICLR 2024, tiny papers)", "CIFAR, ResNet-18 and ViT", UNREAD,
        f"MNIST, {IMAGES} images, CNN, each class, alpha 5: classes at 0.05 or less with the rest within 0.12",
        "works", lambda world: world.dampened("ssd-label-free", alpha=5.0),
        (Check("works", ">=", 1), Check("works", ">=", 8)),
    ),
    Case(
        "prune-first", "pruned to 5% first, fine-tuning leaves less of a class, and keeps the rest",
        f"{SPARSE}, Table 3", f"{CIFAR}, 95% pruned in training, 10 epochs", UNREAD,
        f"{CLASS}; a trained model is pruned; 5 epochs of Adam at 1e-4; how much less is left",
        "gain", _pruned, (Check("gain", ">=", 0.05), Check("rest", ">=", "before", -0.03)),
    ),
    Case(
        "l1-sparse", "leaves less of a class than the same steps without the norm",
        f"{SPARSE}, abstract", f"{CIFAR}, 10 epochs of SGD at 0.01", "0.77 less ('77% unlearning efficacy gain')",
        f"{CLASS}; 10 epochs of SGD at 0.01; how much less is left",
        "gain", lambda world: _less(world.removed("l1-sparse", **SGD), world.removed("l1-sparse")),
        (Check("gain", ">=", 0.01), Check("gain", ">=", 0.38), *REMOVED),
    ),
)  # fmt: skip

# --- single records, regions of a regression, memorisation -----------------------------------------------------------

IAU = {
    "claim": "in one step near a retrained model on forgotten records, at no cost of utility",
    "source": "arXiv 2507.23257", "there": "CIFAR-10, LeNet-5, records at random",
    "published": "first in mean rank; 13 s, Fisher forgetting 1294 s (second-hand, a review); accuracies not read",
    "here": f"MNIST, {SINGLE} images, CNN, restricted gradients, a fifth at random: how far from the oracle's accuracy",
    "figure": "gap",
    "checks": (
        Check("gap", "<=", "half of gap before"), Check("lost", "<=", 0.03), Check("time", "<=", 0.05),
    ),
}  # fmt: skip
REGRESSION = {
    "source": "arXiv 2210.08196 (ICML 2023)", "there": "AgeDB, ages to 30, one epoch", "published": UNREAD,
    "here": "California, 2,000 districts, MLP, those above 350,000 dollars, batches of 32: "
    "error there on test districts, 0 as before, 1 as the oracle's",
    "figure": "rise",
    "checks": (
        Check("rise", ">=", 0.5), Check("rest", "<=", 1.1), Check("distance", "<=", 0.5), Check("relearn", ">=", 0.5),
    ),
}  # fmt: skip
RANKS = {  # of two data sets
    "confidence": (0.80, 0.91), "binary-accuracy": (0.71, 0.89),
    "holdout-retraining": (0.62, 0.67), "loss-curvature": (0.69, 0.70),
}  # fmt: skip
OTHERS = (
    Case(method="iau", measure=lambda world: world.stepped("iau"), **IAU),
    Case(method="iau-released", measure=lambda world: world.stepped("iau-released"), **IAU),
    Case(
        method="blindspot", claim="errs on what is forgotten as a retrained model does, and relearns as slowly",
        measure=lambda world: world.regressed("blindspot", batch=32), **REGRESSION,
    ),
    Case(
        method="gaussian", claim="errs on what is forgotten as a retrained model does, and relearns as slowly",
        measure=lambda world: world.regressed("gaussian", batch=32), **REGRESSION,
    ),
    Case(
        "rum", "NegGrad+ in three parts by memorisation beats NegGrad+ on all at once",
        "arXiv 2406.01257 (NeurIPS 2024), abstract: 'substantially improves'", "CIFAR-10, ResNet-18, 3,000 records",
        UNREAD, "digits, 400 images, MLP, 60 of little, some, much memorisation: ToW more, each at its best alpha",
        "gain", lambda world: world.refined(0.1, (0.97, 0.9, 0.8, 0.6)), (Check("gain", ">=", 0.01),),
    ),
    *(
        Case(
            f"proxy {proxy}", "ranks records as true memorisation does (Spearman)",
            "arXiv 2410.16516; figure: notes of a third party", "CIFAR, ResNets",
            "{:.2f}-{:.2f} (second-hand)".format(*RANKS[proxy]) if proxy in RANKS else UNREAD,
            "digits, 400 images, MLP; truth by 200 models on 70% each",
            proxy, lambda world, proxy=proxy: {proxy: world.proxies[proxy]},
            (Check(proxy, ">=", 0.3), Check(proxy, ">=", RANKS.get(proxy, (0.3, 1.0))[0])),
        )
        for proxy in PROXIES
    ),
)  # fmt: skip
CASES = {case.method: case for case in (*CLASSES, *OTHERS)}
