"""What serving m shards costs beside one forward pass, and how soon a deletion has its whole effect.

    python -m bench.serving [--model FOLDER] [--shards 5] [--slices 3] [--rows 8 32] [--tokens 24] [--out FOLDER]

An encoder of MiniLM's shape with random weights (or ``--model``), nodes of random numbers, placement ``layers``. With f
the share of blocks at or above the lowest live adapter, the trunk once and the tops of m shards as one batch have the
floor (1 - f) + m f forward passes of the plain model. ``together`` is what a service computes; ``one by one`` its paths
after each other, each whole; ``plain`` the base with all adapters masked; ``peft`` m PEFT models after each other,
which is checked to give equal answers before anything is timed. Goal: together <= 1.15 floors.

Then, on a store of the demo's size, with memory for adapters limited to what is needed, to half of all nodes, or to
none: ``effect``: the deleted is in no answer; ``ideal``: the best path that is left answers, loaded in the background.
Rows are appended to serving.csv.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import deletion, machine
from bench.rows import RESULTS, append
from bench.timing import spread, take
from s3t_ext.lora.nn import pack_layers
from s3t_ext.lora.peft import to_peft
from s3t_ext.lora.pinned import pinned
from s3t_ext.models.folder import load_model
from s3t_ext.models.heads import orthonormal
from s3t_ext.system.config import Config
from s3t_ext.system.network import Network
from s3t_ext.system.serve import Service
from s3t_ext.system.serving.ensemble import outputs
from s3t_ext.system.serving.pools import Adapters

COLUMNS = (
    *("case", "provider", "shards", "slices", "depth", "rows", "tokens", "dtype", "threads", "metric"),
    *("p20", "p50", "p80", "unit", "repeats", "floor", "over_floor"),
    *("device", "driver", "versions", "commit", "dirty", "utc", "command"),
)
CLASSES, RANK, GOAL = 2, 8, 1.15
MINILM = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
          "intermediate_size": 1536, "max_position_embeddings": 512}  # fmt: skip


class Bench:
    """A network whose pools hold one random path of full depth for each shard."""

    def __init__(self, folder: Path, shards: int, slices: int, dtype: torch.dtype) -> None:
        config = Config(shards=shards, slices=slices, strategy="sisa", placement="layers", rank=RANK, scale=1.0)
        base = load_model(folder, causal=False).to(dtype)
        head = orthonormal(bytes(32), CLASSES, base.features)
        self.folder, self.shards, self.slices = folder, shards, slices
        self.network = pack_layers(Network(base, head, "frozen", CLASSES, config, 1).eval())
        pools, chance = Adapters(self.network, [shards] * slices), torch.Generator().manual_seed(0)
        self.table = torch.full((shards, slices), -1, dtype=torch.int32)  # (m, L)
        for shard in range(shards):
            for depth in range(1, slices + 1):
                tensors = {}
                for name, layer in self.network.layers.items():
                    for part, width in (("a", layer.in_features), ("b", layer.out_features)):
                        drawn = torch.randn(RANK, width, generator=chance) * (layer.in_features**-0.5)
                        tensors[f"{name}.{part}"] = drawn.numpy()
                node = shard, tuple(range(depth))
                self.table[shard, depth - 1] = pools.load(node, "", tensors).slot

    def paths(self, depth: int) -> Tensor:
        """Give the table with the adapters of the first stages alone."""
        return self.table.masked_fill(torch.arange(self.slices) >= depth, -1)

    def share(self, depth: int) -> float:
        """Give f: the share of blocks at or above the lowest adapter."""
        blocks = len(self.network.base.block_list())
        return (blocks - self.network.trunk(depth)) / blocks

    def plain(self, x: Tensor) -> Tensor:
        """Run the base alone."""
        with self.network.routing.batch([len(x)], torch.full_like(self.table[:1], -1)):
            return self.network(x)

    def one_by_one(self, x: Tensor, depth: int) -> Tensor:
        """Run each path whole, after the others."""
        answers = []
        for row in self.paths(depth):
            with self.network.routing.batch([len(x)], row[None]):
                answers.append(self.network(x))
        return torch.stack(answers)

    def peft(self, scratch: Path, depth: int) -> Callable[[Tensor], Tensor]:
        """Give m PEFT models over one base, called after each other, with the same head."""
        import peft
        import transformers

        kind = transformers.AutoModel.from_pretrained(self.folder, dtype=self.network.dtype).eval()
        model: Any = None
        for shard in range(self.shards):
            to = scratch / f"{depth} {shard}"
            to_peft(self.network.base.backbone, to, routing=self.network.routing, group=shard)
            if model is None:
                model = peft.PeftModel.from_pretrained(kind, to, adapter_name="shard 0").eval()
            else:
                model.load_adapter(to, adapter_name=f"shard {shard}")
        weight = self.network.head.weight

        def call(x: Tensor) -> Tensor:
            answers = []
            for shard in range(self.shards):
                model.set_adapter(f"shard {shard}")
                hidden = model(input_ids=x, attention_mask=torch.ones_like(x)).last_hidden_state
                answers.append(hidden.float().mean(1) @ weight.T)
            return torch.stack(answers)

        return call


def costs(bench: Bench, scratch: Path, rows: int, tokens: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Measure a service's pass at each depth."""
    x = torch.from_numpy(np.random.default_rng(0).integers(5, 5000, (rows, tokens)))
    for depth in range(1, bench.slices + 1):
        table = bench.paths(depth)
        bench.network.routing.table = table
        theirs = bench.peft(scratch / f"{rows}", depth)
        calls: dict[str, Callable[[], Tensor]] = {
            "plain": lambda: bench.plain(x),
            "together": lambda table=table, depth=depth: outputs(bench.network, x, table, depth),
            "one by one": lambda depth=depth: bench.one_by_one(x, depth),
            "peft": lambda theirs=theirs: theirs(x),
        }
        with torch.inference_mode(), pinned():
            together = calls["together"]()
            if not torch.equal(together, calls["one by one"]()):
                raise RuntimeError(f"depth {depth}: together is not, bit for bit, one by one")
            error = (together - calls["peft"]()).abs().max() / together.abs().max()
            if error > (1e-3 if bench.network.dtype == torch.float32 else 0.1):
                raise RuntimeError(f"depth {depth}: PEFT answers otherwise, by {float(error):.1e}")
            times = take(calls, "1t", seconds)
        f = bench.share(depth)
        floor = (1 - f) + bench.shards * f
        for name, found in times.items():
            over = found.p50 / (times["plain"].p50 * floor)
            yield {
                "case": "pass", "provider": name, "depth": depth, "rows": rows, "tokens": tokens, "metric": "time",
                "p20": found.p20 * 1e3, "p50": found.p50 * 1e3, "p80": found.p80 * 1e3, "unit": "ms",
                "repeats": found.repeats, "floor": round(floor, 3), "over_floor": round(over, 3),
            }  # fmt: skip


# --- a deletion's effect under a limit -------------------------------------------------------------------------------


@contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """Give a copy of the whole store."""
    shutil.rmtree(folder / "now", ignore_errors=True)
    shutil.copytree(folder / "whole", folder / "now")
    yield folder / "now" / "store"


def effects(folder: Path, people: list[list[str]], memory: str, stores: int) -> Iterator[dict[str, Any]]:
    """Delete one person of every slice but the last from copies of a store, waiting for rest between two requests."""
    samples: dict[str, list[float]] = {"effect": [], "acknowledgement": [], "ideal": []}
    for _ in range(stores):
        with copied(folder) as store, deletion.Timed(store) as whole:
            every = sum(pool.nbytes for layer in whole.network.layers.values() for pool in (layer.a, layer.b))
            limit = {"least": least(store), "half": max(least(store), every // 2), "all": None}[memory]
            with limited(store, limit) as service:
                for names in people[:-1]:
                    start = time.monotonic()
                    service.acknowledge(names[:1])
                    done = time.monotonic()
                    while service.depths != deepest(service):
                        time.sleep(0.0002)
                    ideal = time.monotonic()
                    masked = service.masked(start)
                    assert masked is not None
                    for name, at in (("effect", masked), ("acknowledgement", done), ("ideal", max(ideal, done))):
                        samples[name].append(1e3 * (at - start))
                    service.settle()
    for name, found in samples.items():
        p = spread(found)
        yield {
            "case": f"deletion, memory {memory}", "provider": "s3t_ext", "metric": name, "p20": p.p20, "p50": p.p50,
            "p80": p.p80, "unit": "ms", "repeats": p.repeats, "shards": deletion.SHARDS, "slices": deletion.SLICES,
        }  # fmt: skip


def limited(store: Path, memory: int | None) -> deletion.Timed:
    """Open a store with a limit."""
    service = deletion.Timed.__new__(deletion.Timed)
    service.masks = []
    Service.__init__(service, store, memory=memory)
    return service


def deepest(service: Service) -> tuple[int, ...]:
    """Read off the plan how deep each shard is, given its dirty slices."""
    dirty, tree = service.folder.ledger.dirty(), service.folder.tree
    return tuple(len(tree.best_live({k for s, k in dirty if s == shard})) for shard in range(deletion.SHARDS))


def least(store: Path) -> int:
    """Find the least memory that a store is served with."""
    try:
        Service(store, memory=1)
    except ValueError as error:
        return int(str(error).split("at least ")[1].split()[0])
    raise RuntimeError("a byte was enough")


def main(argv: list[str] | None = None) -> int:
    """Measure, append rows, print them; 1 if the goal is missed."""
    p = argparse.ArgumentParser(
        prog="python -m bench.serving", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--model", type=Path, help="folder of an encoder of the transformers library")
    p.add_argument("--shards", type=int, default=5)
    p.add_argument("--slices", type=int, default=3)
    p.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    p.add_argument("--tokens", type=int, default=24)
    p.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    p.add_argument("--seconds", type=float, default=4.0, help="of each depth")
    p.add_argument("--stores", type=int, default=3, help="copies of the store that people are deleted from")
    p.add_argument("--out", type=Path, default=RESULTS)
    args = p.parse_args(argv)
    shared = {k: v for k, v in machine.describe("cpu", "bench.serving").items() if k in COLUMNS}
    shared["threads"] = torch.get_num_threads()
    missed = 0
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = args.model or random_encoder(Path(scratch) / "model")
        print(f"{'dtype':10}{'rows':>6}{'depth':>6}  {'provider':12}{'ms':>9}{'floors':>8}")
        for dtype in args.dtype:
            bench = Bench(folder, args.shards, args.slices, getattr(torch, dtype))
            for rows in args.rows:
                found = list(costs(bench, Path(scratch) / dtype, rows, args.tokens, args.seconds))
                sized = {"shards": args.shards, "slices": args.slices, "dtype": dtype, **shared}
                append(args.out / "serving.csv", [{**sized, **row} for row in found], COLUMNS)
                for row in found:
                    over = row["over_floor"]
                    verdict = ""
                    if row["provider"] == "together":
                        missed += over > GOAL
                        verdict = f"  goal {GOAL}: {'missed' if over > GOAL else 'met'}"
                    print(
                        f"{dtype:10}{rows:6}{row['depth']:6}  {row['provider']:12}{row['p50']:9.2f}{over:8.2f}{verdict}"
                    )
        cells = deletion.make(Path(scratch)) if args.stores else []
        for memory in ("least", "half", "all") if args.stores else ():
            found = list(effects(Path(scratch), cells, memory, args.stores))
            append(args.out / "serving.csv", [{**shared, **row} for row in found], COLUMNS)
            for row in found:
                print(f"{row['case']:28}{row['metric']:16}{row['p20']:8.2f}{row['p50']:8.2f}{row['p80']:8.2f} ms")
    return int(missed > 0)


def random_encoder(folder: Path) -> Path:
    """Write an encoder of MiniLM's shape: what its weights are changes no time."""
    import transformers

    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**MINILM)).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
