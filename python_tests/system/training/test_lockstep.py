"""Lock-step equals one by one, bit for bit: any number of nodes, lanes and forward passes, states kept or computed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_models
import torch
import untrained

import s3t_ext
from s3t_ext.lora.optim import clip_by_node
from s3t_ext.models.folder import build, load_model, model_hash, save_model
from s3t_ext.store.crypt import StoreKey
from s3t_ext.store.tensors import weights_hash
from s3t_ext.system.config import Config
from s3t_ext.system.creation import admit, creating
from s3t_ext.system.data.ingest import lay_out
from s3t_ext.system.data.tables import Table
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.network import declare_head
from s3t_ext.system.training import rows, trunk
from s3t_ext.system.training.budget import find_budget
from s3t_ext.system.training.train import Settings, Trainer, jobs

KEY = bytes(range(32))
SIZES = {"shards": 3, "slices": 2, "rank": 2, "steps": 3, "batch": 4, "lr": 0.01}
WAYS = (
    Settings(nodes_per_pass=1, lanes=1, trunk="off"),
    Settings(nodes_per_pass=2, lanes=2, trunk="memory"),
    Settings(nodes_per_pass=7, lanes=3, trunk="file", rows=40),
    Settings(lanes=1, trunk="off"),
)


class Quiet:
    def advance(self, *_: object) -> None:
        pass


def table(task: str, people: int = 24, longest: int = 16) -> Table:
    """Draw records of a task."""
    rng = np.random.default_rng(3)
    schema = untrained.SCHEMAS[task]
    x = np.full((people, untrained.LENGTH), -1, np.int32)
    x[:, :longest] = untrained.texts(people, longest=longest)
    inputs = x if schema.is_text else rng.normal(size=(people, *schema.shape)).astype(np.float32)
    labels = rng.integers(0, 3, people)
    if task == "regression":
        labels = rng.normal(size=(people, 2)).astype(np.float32)
    if task == "causal":
        labels = np.where(np.arange(untrained.LENGTH) >= 3, inputs, -100).astype(np.int64)
        labels[labels < 0] = -100
    return Table([(f"person {i}",) for i in range(people)], inputs, labels)


def opened(at: Path, base: Path, task: str, records: Table, config: Config) -> StoreFolder:
    """Make a store whose key is in memory alone, and open it."""
    schema, model, store_key = untrained.SCHEMAS[task], load_model(base, task == "causal"), StoreKey.new()
    head = declare_head(untrained.KEY, schema, config, model)
    made = creating(at, schema, config, untrained.KEY, base, model_hash(model), head, store_key=store_key)
    with made as folder:
        admit(folder, lay_out(records, untrained.KEY, config.shards, config.slices), {})
    return StoreFolder(at, store_key)


def retrained(folder: StoreFolder, way: Settings) -> dict:
    """Train all nodes again, over the ancestors in the store; give the hashes of their weights."""
    ids, found = folder.identities(folder.ledger.slices()), {}
    trainer = Trainer(folder, way)
    for nodes in jobs(ids):
        for weights in trainer.passes(nodes, ids, folder.ledger.slices, Quiet()):
            found |= {node: weights_hash(tensors) for node, tensors in weights.items()}
    return found


@pytest.mark.parametrize("placement", ["layers", "stack"])
@pytest.mark.parametrize(
    ("family", "task", "more"),
    [
        ("bert", "classification", {"head": "trained", "clip": 0.05, "accumulate": 2}),
        ("bert", "regression", {"dropout": 0.2}),
        ("vit", "image", {"clip": 0.05}),
        ("llama", "causal", {"accumulate": 2}),
        ("bert", "classification", {"precision": "bfloat16"}),
    ],
    ids=["text", "regression", "image", "causal", "bf16"],
)
def test_any_way_to_train_together_gives_the_bits_of_one_by_one(
    tmp_path, monkeypatch, family, task, more, placement
) -> None:
    base = untrained.base(tmp_path / "base", family, task)
    if task == "regression":  # a model that pads
        base = tiny_models.save(family, tmp_path / "base", intermediate_size=72)
    assert load_model(base, task == "causal").unpads == (task in ("classification", "causal"))
    config = Config(**SIZES, placement=placement, **more)
    with closing(opened(tmp_path / "store", base, task, table(task), config)) as folder:
        ids = folder.identities(folder.ledger.slices())
        Trainer(folder, WAYS[0]).train(ids, progress=False)
        alone = {node: folder.nodes.manifest(name)["weights"] for node, name in ids.items()}
        assert len(set(alone.values())) == len(alone) == 9
        for way in WAYS[1:]:
            assert retrained(folder, way) == alone, way
        monkeypatch.setattr(Trainer, "_size", lambda *_: 2**60)  # more than memory holds: records lie in a file
        assert retrained(folder, WAYS[2]) == alone


def test_a_longer_text_moves_no_other_node(tmp_path, monkeypatch) -> None:
    """Rows of a node are counted in blocks of 256: a padding that follows another's text shifts them."""
    base = tiny_models.save("bert", tmp_path / "base", intermediate_size=72)
    assert not load_model(base).unpads
    config = Config(**{**SIZES, "batch": 20, "steps": 2}, placement="layers", clip=0.05)
    short = table("classification", 60, longest=16)
    long = Table(short.subjects, short.inputs.copy(), short.labels)
    long.inputs[0] = untrained.texts(3)[1]  # of 24 tokens
    found = []
    for name, records in (("short", short), ("long", long)):
        with closing(opened(tmp_path / name, base, "classification", records, config)) as folder:
            ids = folder.identities(folder.ledger.slices())
            Trainer(folder).train(ids, False)
            found.append({node: folder.nodes.manifest(name)["weights"] for node, name in ids.items()})
            layout = lay_out(records, untrained.KEY, config.shards, config.slices).slices
    ((shard, slice_),) = {cell for cell, part in layout.items() if ["person 0"] in part.subjects}
    moved = {node for node in found[0] if found[0][node] != found[1][node]}
    assert moved == {node for node in found[0] if node[0] == shard and slice_ in node[1]}


def test_steps_may_differ_by_depth(mlp, tmp_path) -> None:
    import tiny as t

    one = t.weights(mlp.fit(tmp_path / "one", steps=(2, 4, 3)))
    two = t.weights(mlp.fit(tmp_path / "two", steps=(2, 2, 3)))
    assert {node: one[node] == two[node] for node in one} == {node: len(node[1]) == 1 for node in one}


def test_norms_are_of_each_node() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(7, 3, 41), torch.randn(7, 5)]
    alone = [[g[j : j + 1].clone() for g in gradients] for j in range(7)]
    norms = [torch.cat([g.flatten() for g in parts]).norm() for parts in alone]
    limit = float(sorted(norms)[3])
    clip_by_node(gradients, limit)
    for j, parts in enumerate(alone):
        clip_by_node(parts, limit)
        assert all(torch.equal(g[j], own[0]) for g, own in zip(gradients, parts, strict=True))
        after = torch.cat([g.flatten() for g in parts]).norm()
        assert after == pytest.approx(min(float(norms[j]), limit), rel=1e-5)


def deleting(folder: StoreFolder, cell: tuple[int, int]) -> tuple[list, dict]:
    """Train with a slice dirty after the first pass; give the trunks, and at each pass what slices are still held."""
    kept: list = []
    make = trunk.Trunk.keep

    def keep(self, *args):
        make(self, *args)
        kept.append(self)

    states: list = []

    def slices():
        now = dict(folder.ledger.slices())
        if states:
            now[cell] = None
        return now

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trunk.Trunk, "keep", keep)
        ids = folder.identities(folder.ledger.slices())
        nodes = next(jobs(ids))
        for _ in Trainer(folder, Settings(nodes_per_pass=2, lanes=1, trunk="memory")).passes(
            nodes, ids, slices, Quiet()
        ):
            numbers = {at: kept[0].records.numbers(at) for at in kept[0].records.keys}
            states.append({at: _finite(kept[0], numbers[at]) for at in numbers})
    return kept, states


def _finite(held: trunk.Trunk, numbers: np.ndarray) -> bool:
    numbers = numbers[held._place[numbers] >= 0]
    parts = held.records.part[numbers]
    states = [held.states(parts, held.records.row[numbers])]
    inputs = [held.records.inputs[p].get(held.records.row[numbers[parts == p]]) for p in np.unique(parts)]
    return all(bool(r.isfinite().all()) for r in states) and any(bool((x != 0).any()) for x in inputs)


def test_states_and_records_of_the_deleted_are_overwritten_between_passes(tmp_path) -> None:
    base = untrained.base(tmp_path / "base", "bert", "classification")
    config = Config(**SIZES, placement="layers")
    with closing(opened(tmp_path / "store", base, "classification", table("classification"), config)) as folder:
        (held,), seen = deleting(folder, (1, 0))
        assert all(seen[0].values()), "all there while the first pass is stored"
        assert not seen[1][1, 0], "gone before the second"
        assert all(there for cell, there in seen[1].items() if cell != (1, 0))
        assert not any(_finite(held, held.records.numbers(cell)) for cell in held.records.keys), "and all at the end"


def test_files_of_records_and_states_have_no_name_nothing_readable_and_are_zeroed(tmp_path, monkeypatch) -> None:
    base = untrained.base(tmp_path / "base", "bert", "classification")
    config = Config(**SIZES, placement="layers")
    plain, files, seen, held = [], [], [], []
    put, make, hold = rows.FileRows.put, rows.tempfile.TemporaryFile, Trainer._hold

    def spy(self, first, tensor):
        put(self, first, tensor)
        plain.append(tensor[0].numpy().tobytes())

    def opening(**how):
        files.append(make(**how))
        return open(f"/proc/self/fd/{files[-1].fileno()}", "r+b", buffering=0)

    def contents() -> list[bytes]:
        return [Path(f"/proc/self/fd/{file.fileno()}").read_bytes() for file in files]

    monkeypatch.setattr(rows.FileRows, "put", spy)
    monkeypatch.setattr(rows.tempfile, "TemporaryFile", opening)
    monkeypatch.setattr(Trainer, "_size", lambda *_: 2**60)
    monkeypatch.setattr(Trainer, "_hold", lambda self, *args: held.append(hold(self, *args)) or held[-1])
    (tmp_path / "scratch").mkdir()
    with closing(opened(tmp_path / "store", base, "classification", table("classification"), config)) as folder:
        ids, now = folder.identities(folder.ledger.slices()), dict(folder.ledger.slices())
        way = Settings(lanes=1, nodes_per_pass=2, trunk="file", scratch=str(tmp_path / "scratch"))
        for _ in Trainer(folder, way).passes(next(jobs(ids)), ids, lambda: now, Quiet()):
            seen.append((contents(), _stored(held[0], (1, 0))))
            assert not list((tmp_path / "scratch").iterdir())
            now[1, 0] = None
    assert len(files) == 2
    assert len(plain) > 4
    assert not any(row[:32] in content for row in plain if len(row) >= 32 for content in seen[0][0])
    assert all(any(row) for row in seen[0][1])
    assert seen[1][1]
    assert not any(any(row) for row in seen[1][1]), "of the deleted nothing is left before the second pass"
    assert [len(set(content)) for content in contents()] == [1, 1], "zeros alone"


def _stored(held, cell: tuple[int, int]) -> list[bytes]:
    """Give the bytes in the files of a slice's records and states."""
    numbers = held.records.numbers(cell)
    parts, places = held.records.part[numbers], held.records.row[numbers]
    found = [(held.records.inputs[p], row) for p, row in zip(parts, places, strict=True)]
    kept = held.trunk._place[numbers]
    found += [(held.trunk._kept[p], place) for p, place in zip(parts, kept, strict=True) if place >= 0]
    return [part._file.read(int(part._at[row]), part._size) for part, row in found]


def test_a_shard_larger_than_memory_trains_to_the_same_bits(tmp_path) -> None:
    """Records of 16 KiB, 6.5 MB in one shard of 16 slices, in 5 MB."""
    arguments = {"shape": [4096], "width": 8, "depth": 2}
    save_model(base := tmp_path / "base", build("mlp", arguments), "mlp", arguments)
    schema = s3t_ext.Schema(classes=("a", "b"), shape=(4096,))
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, 4096)).astype(np.float32)
    records = Table([(f"person {i}",) for i in range(400)], inputs, rng.integers(0, 2, 400))
    config = Config(shards=1, slices=16, strategy="sisa", rank=2, steps=1, batch=4)
    found = []
    for memory in (0, 5_000_000):
        at, told = tmp_path / str(memory), Settings(memory=memory)
        report = s3t_ext.fit(at, records, schema, base, config, key=KEY, settings=told, progress=False)
        forms = [stage["records"]["form"] for stage in report["training"]["stages"]]
        assert set(forms[8:]) == {"file" if memory else "memory"}
        found.append(tiny.weights(at))
        assert sum(path.stat().st_size for path in (at / "records").iterdir()) > 6_000_000
    assert found[0] == found[1]
    with pytest.raises(
        ValueError, match=r"memory: expected at least [\d.]+ .iB for one node and [\d.]+ .iB to read the largest slice"
    ):
        s3t_ext.fit(tmp_path / "none", records, schema, base, config, settings=Settings(memory=3_000_000))


def test_memory_decides_how_many_nodes_train_together(tmp_path) -> None:
    """The size of MiniLM: 16 nodes and more in 8 GB, at 128 tokens; fewer in less; none is refused."""
    import transformers

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    transformers.BertModel(transformers.BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "base")
    config = Config(shards=2, slices=2, placement="stack", batch=16, rank=8)
    with closing(opened(tmp_path / "store", tmp_path / "base", "classification", table("classification"), config)) as f:
        lane = Trainer(f, Settings(lanes=1)).lanes[0]
        long = s3t_ext.Schema(classes=("a", "b"), max_length=128)

        def fit(gigabytes: float):
            return find_budget(lane, long, (1, 2), int(gigabytes * 1e9), 2, 4096, 0)

        assert fit(8).nodes >= 16
        assert fit(8).taken <= 8e9
        assert 1 <= fit(1.5).nodes < fit(8).nodes or fit(1.5).lanes < fit(8).lanes
        with pytest.raises(ValueError, match=r"memory: expected at least [\d.]+ .iB for one node, got 9[\d.]+ MiB"):
            fit(0.1)
        trainer = Trainer(f, Settings(memory=10_000_000))
        with pytest.raises(ValueError, match="memory: expected at least"):
            trainer.train(f.identities(f.ledger.slices()), False)
        assert not list((tmp_path / "store" / "nodes").glob("*"))


@pytest.mark.parametrize("wrong", [{"lanes": -1}, {"rows": 0}, {"trunk": "disk"}, {"nodes_per_pass": 1.5}])
def test_settings_are_checked(wrong) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        Settings(**wrong)
