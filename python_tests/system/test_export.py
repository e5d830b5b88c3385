"""Export: PEFT loads it and answers as the node does; the ledger knows of it before it is there."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import untrained as u
from safetensors.torch import load_file

import s3t_ext
from s3t_ext.cli.main import main
from s3t_ext.ledger import LedgerError
from s3t_ext.store.files import StoreError
from s3t_ext.system import export as exporting
from s3t_ext.system.export import export
from s3t_ext.system.folder import StoreFolder
from s3t_ext.system.heal import cleanse
from s3t_ext.system.serve import Service

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CASES = (
    ("bert", "classification", "layers"),
    ("bert", "regression", "stack"),
    ("vit", "image", "stack"),
    ("llama", "causal", "layers"),
    ("gpt2", "causal", "stack"),
)


def by_peft(store, folder, task: str, x: torch.Tensor) -> torch.Tensor:
    """Give what PEFT's model over the original base answers to one record, with the head beside it."""
    kind = transformers.AutoModelForCausalLM if task == "causal" else transformers.AutoModel
    with pytest.warns(match="fan_in_fan_out") if "gpt2" in str(store) else torch.inference_mode():
        model = peft.PeftModel.from_pretrained(kind.from_pretrained(store / "base"), folder).eval()
    with torch.inference_mode():
        if task == "causal":
            return model(input_ids=x[x >= 0][None].long()).logits[0, -1].softmax(-1)
        if task == "image":
            features = model(pixel_values=x[None]).last_hidden_state[:, 0]
        else:
            features = model(input_ids=x[x >= 0][None].long()).last_hidden_state.mean(1)
        head = load_file(folder / "head.safetensors")
        y = features @ head["weight"].T + head.get("bias", 0.0)
    return (y[0] / torch.tensor([0.5, 2.0]) + torch.tensor([5.0, -1.0])) if task == "regression" else y[0].softmax(-1)


@pytest.mark.parametrize(("family", "task", "placement"), CASES)
def test_peft_loads_it_and_answers_as_the_node_does(family, task, placement, tmp_path) -> None:
    store = u.store(tmp_path / f"{family} store", family, task, placement=placement, shards=1, strategy="sisa")
    x = torch.randn(3, 1, 12, 12) if task == "image" else torch.from_numpy(u.texts(3, seed=4))
    s3t_ext.delete(store, u.people_by_cell(store)[0, 2][:1])
    report = export(store, tmp_path / "out", 0)
    assert report["slices"] == [0, 1]
    assert report["rank"] == (4 if placement == "stack" else 2)
    about = json.loads((tmp_path / "out" / "s3t.json").read_text())
    assert {"export": str(tmp_path / "out"), **about} == report
    with Service(store) as service:
        answer = service.predict(x.numpy())
        assert list(answer.nodes) == report["nodes"]
        base = torch.stack([by_peft(store, tmp_path / "out", task, row) for row in x])
    torch.testing.assert_close(base, torch.from_numpy(answer.scores), rtol=1e-3, atol=1e-5)
    export(store, tmp_path / "first", 0, [0])
    other = torch.stack([by_peft(store, tmp_path / "first", task, row) for row in x])
    assert (other - base).abs().max() > 1e-3, "another node, another answer"


@pytest.fixture
def store(tmp_path):
    return u.store(tmp_path / "store", "bert", "classification")


def test_the_ledger_knows_first_and_receipts_name_it(store, tmp_path, monkeypatch) -> None:
    seen = []

    def watched(*args, **how):
        with StoreFolder(store) as folder:
            seen.extend(folder.ledger.exports())
        assert not (tmp_path / "out").exists()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(exporting, "to_peft", watched)
        with pytest.raises(StoreError, match=r"cannot write .*out: No space left"):
            export(store, tmp_path / "out", 1, [2, 0])
    assert [(e.export, e.kind, e.cells) for e in seen] == [("out", "adapter", {(1, 2), (1, 0)})]
    assert not list(tmp_path.glob(".out*"))
    export(store, tmp_path / "out", 1, [2, 0])
    cells = u.people_by_cell(store)
    assert len(s3t_ext.delete(store, [cells[1, 0][0]])["exports"]) == 2, "the one that failed may have left, too"
    assert s3t_ext.delete(store, [cells[1, 1][0]])["exports"] == []


def test_a_node_that_dies_as_it_is_exported_stays(store, tmp_path, monkeypatch) -> None:
    load, person = exporting.load_network, u.people_by_cell(store)[0, 1][0]

    def slow(*args):
        s3t_ext.delete(store, [person])
        return load(*args)

    monkeypatch.setattr(exporting, "load_network", slow)
    with pytest.raises(StoreError, match="was deleted meanwhile: nothing was written"):
        export(store, tmp_path / "out", 0, [1])
    assert not (tmp_path / "out").exists()


def test_a_node_whose_slice_dies_and_heals_as_it_is_exported_stays(store, tmp_path, monkeypatch) -> None:
    load, person = exporting.load_network, u.people_by_cell(store)[0, 1][0]

    def slow(*args):
        s3t_ext.delete(store, [person])
        with StoreFolder(store) as folder:
            cleanse(folder)
        return load(*args)

    monkeypatch.setattr(exporting, "load_network", slow)
    with pytest.raises(StoreError, match="was deleted meanwhile: nothing was written"):
        export(store, tmp_path / "out", 0, [1])
    assert not (tmp_path / "out").exists()


def test_a_ledger_that_fails_lets_nothing_out(store, tmp_path, monkeypatch) -> None:
    def fail(*_):
        raise LedgerError("disk I/O error")

    monkeypatch.setattr("s3t_ext.ledger.Ledger.export", fail)
    with pytest.raises(LedgerError):
        export(store, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_told_from_the_command_line(store, tmp_path, capsys) -> None:
    def ask(*words: object) -> tuple[int, str, str]:
        status = main(["export", *map(str, words)])
        return status, *capsys.readouterr()

    s3t_ext.delete(store, u.people_by_cell(store)[0, 0][:1])
    for words, says in (
        ((store, tmp_path, "--shard", 0), "FOLDER: expected a new folder"),
        ((store, store / "out", "--shard", 0), "FOLDER: expected a new folder outside the store"),
        ((store, tmp_path / "out", "--shard", 2), "shard: expected 0..1, got 2"),
        ((store, tmp_path / "out", "--shard", 0, "--path", "0"), "slices: expected the path of a live node of shard 0"),
        ((store, tmp_path / "out", "--shard", 0, "--path", "a"), "--path: expected slices as 0,2"),
    ):
        status, _, error = ask(*words)
        assert (status, says in error) == (2, True), error
    status, out, _ = ask(store, tmp_path / "out", "--shard", 0, "--path", "1,2")
    assert (status, "shard 0, slices 1,2, rank 4, head in head.safetensors" in out) == (0, True)
    status, out, _ = ask(store, tmp_path / "again", "--shard", 1, "--json")
    assert (status, json.loads(out)["slices"]) == (0, [0, 1, 2])
    assert np.isfinite(load_file(tmp_path / "again" / "head.safetensors")["weight"].numpy()).all()
