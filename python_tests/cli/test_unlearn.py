"""``s3t unlearn``: what it says of what it did, what it refuses, and that it writes whole or nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import tiny as tiny_system
import torch
from safetensors.torch import load_file, save_file

from s3t_ext.approximate import METHODS, Records
from s3t_ext.approximate.folder import load_adapter
from s3t_ext.cli.main import main
from s3t_ext.cli.unlearn import _value
from s3t_ext.cli.unlearn_report import _outcome, holds, scores
from s3t_ext.models.folder import build, load_model, save_model

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Give the folder of an adapter that has learnt the table of ``files``, and its head."""
    tiny = tiny_system.make(tmp_path_factory.mktemp("learnt"))
    torch.manual_seed(0)
    base = load_model(tiny.base)
    names = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=names))
    head = torch.nn.Linear(16, 3)
    x, y = torch.from_numpy(tiny.table.inputs), torch.from_numpy(tiny.table.labels)
    optimizer = torch.optim.Adam([*(p for p in model.parameters() if p.requires_grad), *head.parameters()], 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(model(x)), y).backward()
        optimizer.step()
    folder = tiny.base.parent / "adapter"
    model.save_pretrained(folder)
    save_file(head.state_dict(), folder / "head.safetensors")
    return folder


@pytest.fixture
def given(files, learnt) -> list[str]:
    """Give words that work: adapter, new folder, base and table."""
    shutil.copytree(learnt, files / "adapter")
    words = [files / "adapter", files / "out", "--base", files / "base", "--table", files / "table.jsonl"]
    return [str(word) for word in words]


def ask(capsys, *words: object) -> tuple[int, dict]:
    status = main(["unlearn", *map(str, words), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_it_says_what_it_did_and_peft_loads_it(files, given, capsys) -> None:
    who = ["--subject", "Person 3", "person 4"]
    status, report = ask(capsys, *given, *who, "--method", "fine-tune", "--set", "epochs=2", "--test", given[-1])
    assert (status, report["guarantee"], report["collapsed"]) == (0, "approximate", False)
    assert report["records"] == {"forgotten": 6, "kept": 54, "test": 60}  # 60 rows of 25 people
    assert report["settings"] == {"epochs": 2, "batch": 32, "learning_rate": 1e-3}
    assert report["before"]["kept"]["utility"] > 0.9
    assert report["after"]["test"]["utility"] > 0.8
    base = load_model(files / "base")
    model = peft.PeftModel.from_pretrained(base, files / "out").eval()
    head = load_file(files / "out" / "head.safetensors")
    rows = [json.loads(line) for line in (files / "table.jsonl").read_text().splitlines()]
    y = torch.tensor([["red", "green", "blue"].index(row["label"]) for row in rows])
    with torch.no_grad():
        said = model(torch.tensor([row["input"] for row in rows])) @ head["weight"].T + head["bias"]
    after = report["after"]["test"]
    assert after["utility"] == pytest.approx(float((said.argmax(1) == y).float().mean()))
    assert after["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(said, y)), rel=1e-4)
    about = (files / "out" / "unlearned.json").read_text()
    told = {"guarantee", "method", "settings", "seed", "budget", "records", "measure", "before", "after", "floor",
            "judged", "doubts", "earlier"}  # fmt: skip
    assert json.loads(about) == {name: report[name] for name in told}
    assert "erson" not in about, "who was forgotten is nobody's business"
    assert main(["unlearn", *given[:1], str(files / "text"), *given[2:], *who, "--method", "fine-tune"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    overlap = "6 with the forgotten and 54 with the kept, equal in every byte: these are none that it never met"
    assert report["doubts"] == [f"--test shares records, {overlap}"]
    again = ["--rows", "1", "--method", "fine-tune", "--set", "epochs=1"]
    _, report = ask(capsys, files / "out", files / "third", *given[2:], *again)
    assert "this adapter has forgotten before" in report["doubts"][0]
    _, report = ask(capsys, files / "third", files / "fourth", *given[2:], *again[:2], "--method", "ssd")
    past = [json.loads((files / name / "unlearned.json").read_text()) for name in ("out", "third")]
    assert [len(each.pop("earlier")) for each in past] == [0, 1]
    assert report["earlier"] == past
    assert first.startswith("APPROXIMATE: fine-tune on 6 of 60 records; ")


def test_the_adapter_that_the_demo_leaves_answers_as_its_own(tmp_path) -> None:
    pytest.importorskip("sklearn")
    from s3t_ext import demo

    _, private, test = demo.parts(0)
    torch.manual_seed(0)
    save_model(tmp_path / "base", build("vit", {}), "vit", {})
    score = demo.full_fine_tune(tmp_path / "base", private, test, 0, tmp_path, steps=12)
    model = load_adapter(tmp_path / "adapter", tmp_path / "base", "classification", 5)
    with torch.no_grad():
        said = model(torch.from_numpy(test.inputs)).argmax(1).numpy()
        with model.peft.disable_adapter():
            bare = model(torch.from_numpy(test.inputs)).argmax(1).numpy()
    assert (said == test.labels).mean() == score != (bare == test.labels).mean()


def test_retraining_is_exact_and_a_seed_fixes_it(files, given, capsys) -> None:
    words = ["--rows", "1-3,60", "--method", "retrain", "--set", "learning_rate=0.02", "--floor", "0"]
    status, report = ask(capsys, *given, *words)
    assert (status, report["guarantee"], report["records"]["forgotten"]) == (0, "exact retrain", 4)
    given[1] = str(files / "again")
    assert ask(capsys, *given, *words)[0] == 0
    bytes_ = [(files / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again", "adapter")]
    assert bytes_[0] == bytes_[1] != bytes_[2]
    given[1] = str(files / "fresh")
    assert ask(capsys, *given, *words, "--set", "epochs=0")[0] == 0
    fresh = load_file(files / "fresh" / "adapter_model.safetensors")
    assert not any(value.any() for name, value in fresh.items() if "lora_B" in name), "it begins as PEFT begins"
    given[1] = str(files / "other")
    assert ask(capsys, *given, *words, "--set", "epochs=0", "--seed", "1")[0] == 0
    other = load_file(files / "other" / "adapter_model.safetensors")
    assert not any(torch.equal(value, other[name]) for name, value in fresh.items() if "lora_A" in name)


def test_collapse_and_budget_are_loud(files, given, capsys) -> None:
    ruin = ["--class", "red", "--method", "gradient-ascent", "--set", "learning_rate=1", "--set", "epochs=20"]
    status, report = ask(capsys, *given, *ruin)
    assert (status, report["collapsed"], (files / "out").exists()) == (1, True, False)
    assert report["after"]["kept"]["utility"] < 0.9 * report["before"]["kept"]["utility"]
    assert main(["unlearn", *given, *ruin]) == 1
    told = capsys.readouterr().out
    assert told.startswith("APPROXIMATE")
    assert "COLLAPSED: accuracy (kept) fell under 0.9" in told
    status, report = ask(capsys, *given, *ruin, "--floor", "0")
    assert (status, report["collapsed"], (files / "out").exists()) == (0, False, True)
    given[1] = str(files / "short")
    status, report = ask(
        capsys, *given, "--rows", "1", "--method", "fine-tune", "--set", "epochs=1000000", "--budget", "0.3"
    )
    assert (status, report["guarantee"], (files / "short").exists()) == (1, "none", True)
    about = json.loads((files / "short" / "unlearned.json").read_text())
    assert (about["guarantee"], about["budget"]) == ("none", 0.3)


@pytest.mark.parametrize(
    "how", [["--set", "learning_rate=0.0"], ["--set", "epochs=0"], ["--set", "batch=1", "--budget", "1e-6"]]
)
def test_what_changed_nothing_is_not_written(how, files, given, capsys) -> None:
    words = [*given, "--rows", "1", "--method", "fine-tune", *how]
    status, report = ask(capsys, *words)
    assert (status, report["guarantee"], report["changed"], report["collapsed"]) == (1, "none", False, False)
    assert main(["unlearn", *words]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NONE: fine-tune on 1 of 60 records; not one weight changed: nothing was forgotten"
    assert lines[-1].startswith("nothing was written; ")
    assert not (files / "out").exists()


def test_a_run_that_diverges_is_a_collapse(files, given, capsys) -> None:
    how = [*given, "--rows", "1", "--method", "gradient-ascent", "--set", "learning_rate=1e30", "--floor", "0"]
    status, report = ask(capsys, *how)
    assert (status, report["guarantee"], report["collapsed"], report["changed"]) == (1, "none", True, False)
    assert report["after"]["kept"] == {"utility": None, "loss": None}
    assert main(["unlearn", *how]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("NONE: gradient-ascent on 1 of 60 records; the loss is no longer finite after ")
    assert not any("0 steps; seed" in line for line in lines), "the steps are in the first line"
    assert lines[-1] == "COLLAPSED: nothing was written"
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("settings", "found", "says"),
    [
        ("learning_rate", {"collapsed": True}, "take smaller steps or fewer, or --floor 0 to have it"),
        (
            "alpha",
            {"collapsed": True},
            "take a smaller change: see its settings in `s3t unlearn --methods`, or --floor",
        ),
        ("learning_rate", {"collapsed": True, "trace": [{"stopped": ""}]}, "take a longer --budget, or smaller steps"),
        ("learning_rate", {"changed": False}, "nothing was written; take larger steps or more of them"),
        ("alpha", {"changed": False}, "nothing was written; take a larger change: see its settings in `s3t"),
        ("alpha", {"changed": False, "trace": [{"stopped": ""}]}, "nothing was written; take a longer --budget"),
    ],
)
def test_advice_fits_the_method_and_what_ended_it(settings, found, says) -> None:
    report = {"diverged": None, "changed": True, "collapsed": False, "trace": [], "settings": {settings: 1}, "floor": 1}
    assert says in _outcome({"measure": "accuracy", "judged": "kept"} | report | found)


def test_models_that_take_no_empty_batch_are_scored() -> None:
    class Picky(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.reshape(len(x), -1))  # of nothing the width is unknown

    some = Records(torch.ones(2, 1, 2), torch.tensor([0, 1]))
    found = scores(Picky(2, 2), {"forgotten": some, "kept": some[torch.arange(0)]})
    assert found["kept"] == {"utility": None, "loss": None}
    assert found["forgotten"]["utility"] == 0.5


def test_with_nothing_kept_the_test_table_judges(files, given, capsys) -> None:
    everybody = ["--rows", "1-60", "--method", "gradient-ascent", "--set", "learning_rate=1e-6"]
    status, report = ask(capsys, *given, *everybody)
    assert (status, "--test: expected a table to judge" in report["error"]) == (2, True)
    status, report = ask(capsys, *given, *everybody, "--test", files / "table.jsonl")
    assert (status, report["judged"], report["records"]["kept"]) == (0, "test", 0)
    status, report = ask(capsys, *given[:1], files / "two", *given[2:], *everybody[:2], "--method", "fine-tune",
                         "--test", files / "table.jsonl")  # fmt: skip
    assert (status, "retain: fine-tune needs records that are kept" in report["error"]) == (2, True)


def test_inner_methods_get_what_they_need(files, given, capsys) -> None:
    held = [json.loads(line) for line in (files / "table.jsonl").read_text().splitlines()[:20]]
    held = [row | {"input": [value + 1 for value in row["input"]]} for row in held]
    (files / "held.jsonl").write_text("\n".join(map(json.dumps, held)))
    words = ["--rows", "1-6", "--floor", "0", "--val", files / "held.jsonl", "--method"]
    inner = ["--set", "methods=['retrain', 'fine-tune']", "--set", "settings=[{'epochs': 1}, {}]"]
    status, report = ask(capsys, *given, *words, "rum", "--set", "proxy=holdout-retraining", *inner)
    assert (status, report["records"]) == (0, {"forgotten": 6, "kept": 54, "val": 20})
    given[1] = str(files / "pruned")
    inner = ["--set", "then=retrain", "--set", "settings={'epochs': 1}"]
    status, report = ask(capsys, *given, *words, "prune-first", *inner)
    assert (status, report["guarantee"]) == (0, "approximate")


def test_twins_among_the_kept_are_told(files, given, capsys) -> None:
    lines = (files / "table.jsonl").read_text().splitlines()
    (files / "table.jsonl").write_text(
        "\n".join([*lines, json.dumps(json.loads(lines[0]) | {"subject": ["twin", "person 9"]})])
    )
    status, report = ask(capsys, *given, "--rows", "1", "--method", "fine-tune", "--set", "epochs=1")
    assert (status, report["doubts"]) == (
        0,
        ["1 forgotten records are among the kept, too, equal in every byte: these remain"],
    )
    assert main(["unlearn", given[0], str(files / "anew"), *given[2:], "--rows", "1", "--method", "retrain"]) in (0, 1)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith("; the adapter was trained anew without them, but met records equal to 1 of them")
    words = ["--subject", "person 9", "--method", "fine-tune", "--set", "epochs=1"]
    _, report = ask(capsys, *given[:1], files / "more", *given[2:], *words)
    assert report["records"]["forgotten"] == 4, "what is about two people goes with either"


def test_an_adapter_that_knows_nothing_is_told(files, given, capsys) -> None:
    (files / "schema.json").write_text(json.dumps({"classes": ["blue", "red", "green"], "shape": [6]}))
    status, report = ask(capsys, *given, "--rows", "1-20", "--method", "fine-tune", "--set", "epochs=1", "--floor", "0")
    assert (status, "order of the schema's classes" in report["doubts"][0]) == (0, True)


def test_a_table_of_one_class_does_not_hide_an_adapter_that_knows_nothing(files, given, capsys) -> None:
    rows = [json.loads(line) | {"label": "red"} for line in (files / "table.jsonl").read_text().splitlines()]
    (files / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, report = ask(capsys, *given, "--rows", "1-20", "--method", "ssd", "--floor", "0")
    assert "order of the schema's classes" in report["doubts"][-1]


def test_one_class_that_is_forgotten_is_no_doubt(files, given, capsys) -> None:
    _, report = ask(capsys, *given, "--class", "red", "--method", "ssd", "--floor", "0")
    assert report["doubts"] == []


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_texts_over_models_of_transformers(family, tmp_path, capsys) -> None:
    """An adapter as PEFT saves it, over a base with a tokenizer, which it names: classes and completions."""
    import texts
    import transformers

    base = texts.model(tmp_path / "base", family)
    causal = family == "llama"
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM" if causal else "SEQ_CLS", init_lora_weights=False)
    peft.get_peft_model(kind.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    table = texts.write(tmp_path / "table.jsonl", texts.pairs(12) if causal else texts.rows(12))
    (tmp_path / "schema.json").write_text(json.dumps(dataclasses.asdict(texts.CAUSAL if causal else texts.SCHEMA)))
    words = [tmp_path / "adapter", tmp_path / "out", "--table", table, "--subject", "person 1", "--floor", "0"]
    status, report = ask(capsys, *words, "--method", "neggrad-plus", "--set", "epochs=1")
    assert (status, report["records"]["forgotten"]) == (0, 1)
    assert report["measure"] == ("accuracy of tokens" if causal else "accuracy")
    then, now = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    assert set(then) == set(now)
    assert any(not torch.equal(then[n], now[n]) for n in then)
    peft.PeftModel.from_pretrained(kind.from_pretrained(base), tmp_path / "out")


def test_the_table_of_methods(capsys) -> None:
    status, report = ask(capsys, "--methods")
    assert (status, set(report)) == (0, set(METHODS))
    assert report["neggrad-plus"]["needs"] == ["retain", "labels"]
    assert report["retrain"]["needs"] == ["retain", "labels", "initial (made here)"]
    assert report["neggrad-plus"]["settings"]["alpha"] == 0.99
    assert set(report["ssd"]["settings"]) == {"alpha", "lam", "batch"}, "an importance is no word"
    assert "checkpoints" not in report["rum"]["settings"]
    assert main(["unlearn", "--methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"{name}: ") for line in lines) for name in METHODS)
    assert "    needs kept records, labels, the untrained adapter; for classification, regression, causal" in lines


def test_what_is_told_of_a_half_precision_adapter_is_told_of_what_is_written(files, given, capsys) -> None:
    for name in ("adapter_model.safetensors", "head.safetensors"):
        tensors = load_file(files / "adapter" / name)
        save_file({key: value.bfloat16() for key, value in tensors.items()}, files / "adapter" / name, {"format": "pt"})
    how = ["--rows", "1-20", "--method", "fine-tune", "--floor", "0", "--set", "epochs=1", "--set"]
    status, report = ask(capsys, *given, *how, "learning_rate=1e-9")
    assert (status, report["changed"]) == (1, False), "less than a half precision number can tell"
    status, report = ask(capsys, *given[:1], files / "moved", *given[2:], *how, "learning_rate=0.05")
    status, again = ask(capsys, files / "moved", files / "same", *given[2:], *how, "learning_rate=0.0")
    assert again["before"] == report["after"] != report["before"]


def test_what_carries_exact_receipts_is_refused(files, given, fit_words, capsys) -> None:
    assert main([*fit_words, "--json"]) == 0
    assert main(["export", str(files / "store"), str(files / "exported"), "--shard", "0"]) == 0
    capsys.readouterr()
    how = ["--subject", "person 3", "--method", "fine-tune"]
    (files / "store" / "inner").mkdir()
    (files / "exported" / "inner").mkdir()
    for adapter, out, says in (
        (files / "store", files / "out", "is a store, whose deletions carry exact receipts"),
        (files / "store" / "inner", files / "out", "is a store, whose deletions carry exact receipts"),
        (files / "exported" / "inner", files / "out", "was exported from a store"),
        (files / "adapter", files / "exported" / "out", "OUT: expected a new folder outside of stores and exports"),
        (files / "exported", files / "out", "was exported from a store, whose receipts name it as exact"),
        (files / "adapter", files / "store" / "out", "OUT: expected a new folder outside of stores"),
    ):
        status, report = ask(capsys, adapter, out, *given[2:], *how)
        assert (status, says in report["error"]) == (2, True), report
        assert not out.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--method: expected one, got none"),
        (["--method", "magic", "--rows", "1"], "--method: expected one of ['"),
        (["--method", "fine-tune"], "expected one that says what to forget, got none"),
        (
            ["--method", "fine-tune", "--subject", "person 3", "nobody"],
            "table.jsonl, 25 in its column 'subject', got 1 of 2 without a record there, number 2 for one",
        ),
        (["--method", "fine-tune", "--class", "pink"], "--class: expected one of ['red', 'green', 'blue'], got 'pink'"),
        (["--method", "fine-tune", "--rows", "0-3"], "--rows: expected rows of 1 to 60 as 1-20,35, got '0-3'"),
        (["--method", "fine-tune", "--rows", "5-"], "--rows: expected rows of 1 to 60 as 1-20,35, got '5-'"),
        (["--method", "fine-tune", "--rows", "7-3"], "--rows: expected rows of 1 to 60"),
        (["--method", "fine-tune", "--rows", "1-60", "--test", "table.jsonl"], "retain: fine-tune needs records"),
        (["--method", "fine-tune", "--rows", "1", "--class", "red"], "not allowed with argument"),
        (["--method", "fine-tune", "--rows", "1", "--set", "epochs"], "--set: expected NAME=VALUE, got 'epochs'"),
        (["--method", "fine-tune", "--rows", "1", "--set", "epochs=2.5"], "--set: epochs: expected int, as 5"),
        (
            ["--method", "fine-tune", "--rows", "1", "--set", "alpha=5"],
            "--set: expected a setting of the method, batch or",
        ),
        (["--method", "fine-tune", "--rows", "1", "--set", "seed=5"], "or learning_rate, got 'seed'"),
        (["--method", "retrain", "--rows", "1", "--set", "initial=x"], "or learning_rate, got 'initial'"),
        (["--method", "rum", "--rows", "1", "--set", "checkpoints=a"], "or settings, got 'checkpoints'"),
        (["--method", "rum", "--rows", "1", "--val", "table.jsonl"], "val: expected records that are not to be"),
        (["--method", "fine-tune", "--rows", "1", "--floor", "-1"], "--floor: expected a fraction of at least 0"),
        (["--method", "fine-tune", "--rows", "1", "--seed", str(2**64)], "seed: expected a whole number of at most 64"),
        (["--method", "fine-tune", "--rows", "1", "--budget", "0"], "budget: expected more than 0 seconds"),
        (["--method", "fine-tune", "--rows", "1", "--schema", "none.json"], "--schema: expected a file"),
    ],
)
def test_bad_input_writes_nothing(words, says, files, given, capsys, monkeypatch) -> None:
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    status = main(["unlearn", *given, *words])
    assert status == 2
    assert says in capsys.readouterr().err
    assert sorted(files.iterdir()) == before


def test_another_base_and_an_old_folder_are_refused(files, given, capsys) -> None:
    how = ["--subject", "person 3", "--method", "fine-tune"]
    (files / "other").mkdir()
    tiny_system.make(files / "other", "vit")
    given[3] = str(files / "other" / "base")
    status, report = ask(capsys, *given, *how)
    assert (status, "--base: expected the model that the adapter" in report["error"]) == (2, True)
    given[1] = str(files / "adapter")
    status, report = ask(capsys, *given, *how)
    assert (status, "OUT: expected a new folder, got" in report["error"]) == (2, True)
    given[1] = str(files / "table.jsonl" / "out")
    status, report = ask(capsys, *given, *how)
    assert (status, "table.jsonl, which is no folder" in report["error"]) == (2, True)


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("5", 0.5, 5.0),
        ("1e-3", 0.5, 1e-3),
        ("ssd", "rum", "ssd"),
        ("(64, 8)", (1,), (64, 8)),
        ("[2]", (1,), (2,)),
        ("3", None, 3),
    ],
)
def test_settings_are_read_as_their_defaults_are(text, default, value) -> None:
    found = _value("x", text, default)
    assert (found, type(found)) == (value, type(value))


def test_a_floor_of_a_score_under_zero() -> None:
    assert holds(-0.5, -0.52, 0.9)
    assert not holds(-0.5, -0.6, 0.9)
    assert not holds(0.8, None, 0.9)
