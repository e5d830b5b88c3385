"""The main job on real images: pretrain on public digits, fit on private ones, forget people, prove it.

scikit-learn's ``digits``: classes 0-4 are public and train the base, classes 5-9 are private. Every private image
belongs to a person with two. Baselines stand beside it, all on one test part and of one seed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from s3t_ext.ledger.identity import Key
from s3t_ext.lora.nn import adapt, adapted_layers
from s3t_ext.lora.peft import to_peft
from s3t_ext.models.folder import build, load_model, save_model
from s3t_ext.models.pretrain import pretrain
from s3t_ext.plan import sisa
from s3t_ext.system.config import Config
from s3t_ext.system.data.schema import Schema
from s3t_ext.system.data.tables import Table
from s3t_ext.system.fit import fit
from s3t_ext.system.serve import Refused, Service
from s3t_ext.system.verify import verify

PUBLIC, PRIVATE = tuple("01234"), tuple("56789")
SCHEMA = Schema(classes=PRIVATE, shape=(1, 8, 8), scale=1 / 16, public_classes=PUBLIC)
CONFIG = Config(shards=5, slices=4, strategy="subsets", placement="stack")
VERIFIED = 12  # nodes drawn after the third request


def run(out: Path | str, seed: int = 0, quiet: bool = False) -> tuple[dict[str, Any], str]:
    """Run the demo into a new folder.

    Args:
        out: gets ``report.json``, ``requests.png``, the table, the base and the store, to go on with by hand; and,
            where PEFT is installed, the fully fine-tuned adapter, for ``s3t unlearn``.
        seed: of split, base, key and requests.

    Returns:
        The report (accuracies are fractions of 1 on the test part, before deletions) and a table to print.
    """
    out = Path(out)
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed: expected a number of at least 0 and below 2^32, got {seed}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: expected a new or empty folder, got {out}, which holds files")
    start = time.perf_counter()

    def say(text: str) -> None:
        if not quiet:
            print(f"[{time.perf_counter() - start:5.1f} s] {text}", flush=True)

    public, private, test = parts(seed)
    out.mkdir(parents=True, exist_ok=True)
    private.save(out / "table.npz", SCHEMA)
    test.save(out / "test.npz", SCHEMA)
    (out / "schema.json").write_text(json.dumps(dataclasses.asdict(SCHEMA)))
    say(
        f"{len(public)} public images (digits 0-4), {len(private)} private (5-9) of {len(set(private.subjects))} "
        f"people, {len(test)} to test"
    )
    base = out / "base"
    torch.manual_seed(seed)
    model = build("vit", {})
    pretrain(model, public.inputs, public.labels, len(PUBLIC), epochs=60, seed=seed)
    save_model(base, model, "vit", {})
    say("base pretrained on the public part")

    key = Key(bytes(32)).derive(f"demo {seed}").mac()
    declared = {
        "public": {s for names in public.subjects for s in names},
        "evaluation": {s for names in test.subjects for s in names},
    }
    fitted = fit(out / "store", private, SCHEMA, base, CONFIG, key=key, declared=declared, progress=not quiet)
    say(f"S3T: {fitted['nodes']} nodes trained in {fitted['seconds']:.1f} s")
    flat = Config(shards=CONFIG.shards * CONFIG.slices, slices=1, strategy="sisa")
    fit(out / "one-slice-shards", private, SCHEMA, base, flat, key=key, progress=False)
    accuracy = {
        "head_only": head_only(model, private, test, key),
        "full": full_fine_tune(base, private, test, seed, out),
    }
    say("baselines trained")

    with (
        Service(out / "store") as s3t,
        Service(out / "store", tree=sisa(CONFIG.slices)) as rival,
        Service(out / "one-slice-shards") as shards,
    ):
        services = {"s3t": s3t, "sisa": rival, "one_slice_shards": shards}
        accuracy["base"] = base_alone(s3t, test)
        accuracy |= {name: service.accuracy(test.inputs, test.labels) for name, service in services.items()}
        checks: list[dict] = []
        requests = _stream(
            services,
            private,
            test,
            seed,
            say,
            third=lambda: checks.append(verify(out / "store", private, VERIFIED, progress=False)),
        )
    checks.append(verify(out / "store", private, "all", progress=False))
    report = {
        "seed": seed,
        "accuracy": accuracy,
        "fit": fitted,
        "requests": requests,
        "verify": _joined(checks),
        "seconds": round(time.perf_counter() - start, 2),
    }
    _figure(out / "requests.png", report)
    (out / "report.json").write_text(json.dumps(report, indent=1))
    return report, _text(report, out)


def parts(seed: int) -> tuple[Table, Table, Table]:
    """Split digits in public, private and test part; subjects own two images each."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = data.images.astype(np.float32)[:, None] * np.float32(SCHEMA.scale)  # (1797, 1, 8, 8)
    labels = data.target.astype(np.int64)
    private = [i for i in range(len(labels)) if labels[i] >= 5]
    random.Random(seed).shuffle(private)

    def table(rows: list[int], first: int, name: str) -> Table:
        return Table([(f"{name}-{n // 2:03}",) for n in range(len(rows))], images[rows], labels[rows] - first)

    held = len(private) // 5
    return (
        table([i for i in range(len(labels)) if labels[i] < 5], 0, "volunteer"),
        table(private[held:], 5, "person"),
        table(private[:held], 5, "tester"),
    )


def _stream(services: Mapping[str, Service], private: Table, test: Table, seed: int, say, third) -> list[dict]:
    """Delete people drawn at random until a shard of S3T is dead."""
    s3t = services["s3t"]
    people = sorted({names[0] for names in private.subjects})
    random.Random(f"requests {seed}").shuffle(people)
    requests: list[dict] = []
    for person in people:
        asked = time.perf_counter()
        s3t.acknowledge([person], f"request-{len(requests) + 1}")
        ack_ms = round((time.perf_counter() - asked) * 1e3, 3)
        s3t.delete([person], f"request-{len(requests) + 1}")  # the same request again: the same receipt, and erasure
        services["one_slice_shards"].delete([person])
        row: dict[str, Any] = {"subject": person, "depths": list(s3t.depths), "ack_ms": ack_ms}
        if row["depths"] != planned_depths(s3t):
            raise RuntimeError(f"depths {row['depths']} where the plan predicts {planned_depths(s3t)}")
        for name, service in services.items():
            try:
                row["accuracy" if name == "s3t" else name] = service.accuracy(test.inputs, test.labels)
            except Refused:
                row["accuracy" if name == "s3t" else name] = None
        requests.append(row)
        if len(requests) == 3:
            third()
            say("verified a sample after the third request")
        if not all(s3t.depths):
            break
    say(f"{len(requests)} requests until a shard was dead")
    return requests


def planned_depths(service: Service) -> list[int]:
    """Read off the plan alone how deep each shard must be, given its dirty slices."""
    dirty = service.folder.ledger.dirty()
    return [len(service.folder.tree.best_live({k for s, k in dirty if s == shard})) for shard in range(CONFIG.shards)]


def _joined(checks: list[dict]) -> dict[str, Any]:
    return {
        "nodes": sum(c["nodes"] for c in checks),
        "depths": sorted({d for c in checks for d in c["depths"]}),
        "shards": sorted({s for c in checks for s in c["shards"]}),
        "mismatched": sum(c["mismatched"] for c in checks),
        "runs": checks,
    }


# --- baselines -------------------------------------------------------------------------------------------------------


def base_alone(service: Service, test: Table) -> float:
    """Score the base under the frozen head with every adapter masked: what is served when nothing is learnt."""
    table = torch.full_like(service.network.routing.table, -1)
    counts = [len(test)] + [0] * (len(table) - 1)
    with torch.no_grad(), service.network.routing.batch(counts, table):
        said = service.network(torch.from_numpy(test.inputs)).argmax(1).numpy()
    return float((said == test.labels).mean())


def head_only(model: nn.Module, private: Table, test: Table, key: bytes) -> float:
    """Score an ensemble of linear heads on the frozen base, one a shard, each trained to convergence."""
    from sklearn.linear_model import LogisticRegression

    from s3t_ext.system.data.ingest import lay_out

    with torch.no_grad():
        features = model(torch.from_numpy(test.inputs)).numpy()
        total = np.zeros((len(test), len(PRIVATE)))
        for part in lay_out(private, Key(key), CONFIG.shards, 1).slices.values():
            head = LogisticRegression(C=10.0, max_iter=5000).fit(
                model(torch.from_numpy(part.inputs)).numpy(), part.labels
            )
            total[:, head.classes_] += head.predict_proba(features)
    return float((total.argmax(1) == test.labels).mean())


def full_fine_tune(
    base: Path, private: Table, test: Table, seed: int, out: Path, steps: int = 600, lr: float = 5e-3
) -> float:
    """Score LoRA of the same rank with a trained head on all private data: what is given up for exact unlearning.

    It is left in ``out/adapter``, where PEFT is installed, as ``s3t unlearn`` reads it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = load_model(base)
        routing = adapt(model, stages=1, rank=CONFIG.rank, scale=CONFIG.scale)
        routing.table.fill_(0)
        parameters: list[torch.Tensor] = []
        for layer in adapted_layers(model).values():
            bound = layer.in_features**-0.5
            a = torch.empty(1, layer.rank, layer.in_features).uniform_(-bound, bound)  # (1, r, K)
            b = torch.zeros(1, layer.rank, layer.out_features)  # (1, r, O)
            layer.train_pool = (a.requires_grad_(), b.requires_grad_())
            parameters += layer.train_pool
        head = nn.Linear(model.features, len(PRIVATE))
        optimizer = torch.optim.AdamW([*parameters, *head.parameters()], lr=lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
        x, y = torch.from_numpy(private.inputs), torch.from_numpy(private.labels)
        for _ in range(steps):
            rows = torch.randint(len(x), (32,))
            F.cross_entropy(head(model(x[rows])), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        with torch.no_grad():
            said = head(model(torch.from_numpy(test.inputs))).argmax(1).numpy()
    if importlib.util.find_spec("peft"):
        to_peft(model, out / "adapter", routing=routing)
        save_file(head.state_dict(), out / "adapter" / "head.safetensors")
    return float((said == test.labels).mean())


# --- what is shown ---------------------------------------------------------------------------------------------------


def _text(report: dict[str, Any], out: Path) -> str:
    names = {
        "base": "the base under a random head",
        "head_only": "linear heads on the frozen base",
        "full": "full fine-tune, cannot forget",
        "sisa": "SISA",
        "one_slice_shards": "one-slice shards",
        "s3t": "S3T",
    }
    lines = ["", "accuracy before deletions"]
    lines += [f"  {names[name]:<34}{value:.3f}" for name, value in report["accuracy"].items()]
    lines += ["", f"{'request':<9}{'person':<13}{'ack ms':>8}  {'depths':<18}{'S3T':>7}{'SISA':>7}{'one-slice':>11}"]
    for i, row in enumerate(report["requests"], 1):
        shown = [
            "   none" if row[name] is None else f"{row[name]:7.3f}" for name in ("accuracy", "sisa", "one_slice_shards")
        ]
        lines.append(
            f"{i:<9}{row['subject']:<13}{row['ack_ms']:8.1f}  {row['depths']!s:<18}{shown[0]}{shown[1]}{shown[2]:>11}"
        )
    check = report["verify"]
    lines += [
        "",
        f"verified: {check['nodes']} nodes of depths {check['depths']} in shards {check['shards']} retrained "
        f"without the deleted people, {check['mismatched']} differ in any bit",
        f"{report['seconds']:.1f} s in all; report, figure and store in {out}: go on with `s3t status {out}/store`, "
        f"`s3t delete {out}/store person-001`",
    ]
    if (out / "adapter").exists():
        lines.append(
            f"approximate methods (`s3t unlearn --methods`): `s3t unlearn {out}/adapter {out}/less --base {out}/base "
            f"--table {out}/table.npz --test {out}/test.npz --subject person-001 --method fine-tune`"
        )
    return "\n".join(lines)


def _figure(path: Path, report: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = report["requests"]
    count = range(len(rows) + 1)
    first = report["accuracy"]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 6), height_ratios=(3, 2))
    for key, name, label in (
        ("accuracy", "s3t", "S3T"),
        ("sisa", "sisa", "SISA"),
        ("one_slice_shards", "one_slice_shards", "one-slice shards"),
    ):
        top.plot(
            count, [first[name], *(r[key] if r[key] is not None else np.nan for r in rows)], marker=".", label=label
        )
    top.axhline(first["full"], color="grey", linestyle="--", label="full fine-tune")
    top.axhline(first["head_only"], color="grey", linestyle=":", label="heads only")
    top.set_ylabel("test accuracy")
    top.legend(fontsize=8)
    depths = np.array([[CONFIG.slices] * CONFIG.shards, *(r["depths"] for r in rows)])  # (requests + 1, m)
    bottom.plot(count, depths, color="C0", alpha=0.3)
    bottom.plot(count, depths.mean(1), color="C0", label="mean over shards")
    bottom.set_xlabel("people forgotten")
    bottom.set_ylabel("live depth")
    bottom.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
