"""Stages of S3T as they are trained without this package: transformers' Trainer over a PEFT model, one node at a time.

A stage has an adapter for each stage on its path, all active, of which the last one learns: what a user of PEFT writes.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.built import Cannot
from s3t_ext.models.folder import load_model
from s3t_ext.models.groups import layer_index, stages_by_layer
from s3t_ext.system.config import Config
from s3t_ext.system.data.tables import Table

WARM = 2  # steps that are not counted
Tokens = tuple[int, int, int]  # of batches: records, their own tokens, tokens with padding


class How(NamedTuple):
    """A way to run Trainer; ``tuned``: batches of one length, no dropout, of the base neither."""

    tuned: bool
    bf16: bool


class Took(NamedTuple):
    """Seconds of a step of one node, of a clock and of all threads' work."""

    wall: float
    cpu: float


class Images(nn.Module):
    """A built-in base model with a linear head, as Trainer takes one."""

    def __init__(self, base: Any, classes: int) -> None:
        super().__init__()
        self.base, self.classifier = base, nn.Linear(base.features, classes)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.classifier(self.base(inputs))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Stages:
    """A model with the adapters of a path's stages, and its records.

    Args:
        folder: of the base; ``config``: of the plan; ``depth``: of the stage, whose path has so many adapters.
        table: the node's records; ``classes``: of the head, which is trained.
    """

    def __init__(self, folder: Path, config: Config, depth: int, table: Table, classes: int, how: How) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise Cannot("peft", str(error)) from None
        self.config, self.how, self.texts = config, how, table.inputs.ndim == 2
        model, blocks = _base(folder, classes, self.texts)
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and layer_index(n, blocks) is not None]
        stage_of = stages_by_layer(names, config.slices, blocks)
        more = {"lora_alpha": config.scale * config.rank, "lora_dropout": 0.0 if how.tuned else 0.1}
        for stage in range(depth):
            mine = [n for n in names if config.placement == "stack" or stage_of[n] == stage]
            lora = LoraConfig(r=config.rank, target_modules=mine, **more)
            if stage:
                self.model.add_adapter(f"stage{stage}", lora)
            else:
                self.model = get_peft_model(model, lora, adapter_name="stage0")
        self.model.base_model.set_adapter([f"stage{stage}" for stage in range(depth)])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(f".stage{depth - 1}." in name or "classifier" in name)
        if how.tuned:
            self.model.train = lambda mode=True: self.model  # as it is: in eval mode, no dropout of the base
            self.model.eval()
        self.rows = [_row(x, y, self.texts) for x, y in zip(table.inputs, table.labels, strict=True)]
        self.timed: list[Tokens] = []  # of every counted step of texts

    def _order(self, count: int, seed: int) -> list[int]:
        """Number the rows of so many batches of one length: spread evenly over those of an epoch, from short to long.

        Trainer's own order begins with the longest: the first steps would be no fair sample.
        """
        from transformers.trainer_pt_utils import get_length_grouped_indices

        size, lengths = self.config.batch, [len(row["input_ids"]) for row in self.rows]
        epoch = get_length_grouped_indices(lengths, size, generator=torch.Generator().manual_seed(seed))
        batches = [epoch[i : i + size] for i in range(0, len(epoch), size)]
        whole = [batch for batch in batches if len(batch) == size] or [(batches[0] * size)[:size]]
        whole.sort(key=lambda batch: max(lengths[i] for i in batch))
        chosen = [whole[(2 * j + 1) * len(whole) // (2 * count)] for j in range(count)]
        random.Random(seed).shuffle(chosen)
        return [i for batch in [*chosen[:1] * WARM, *chosen] for i in batch]

    def steps(self, count: int, seed: int) -> Took:
        """Train for so many steps, after a few that are not counted."""
        from transformers import Trainer, TrainerCallback, TrainingArguments

        times: list[tuple[float, float]] = []
        tokens: list[Tokens] = []
        order = self._order(count, seed) if self.how.tuned and self.texts else None

        class Sampled(Trainer):
            def _get_train_sampler(self, *given: Any) -> Any:
                return super()._get_train_sampler(*given) if order is None else order

        def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
            if not self.texts:
                return _images(rows)
            batch = _texts(rows)
            tokens.append((len(rows), int(batch["attention_mask"].sum()), batch["attention_mask"].numel()))
            return batch

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                times.append((time.perf_counter(), time.process_time()))

        with tempfile.TemporaryDirectory() as out:
            arguments = TrainingArguments(
                out,
                per_device_train_batch_size=self.config.batch,
                max_steps=WARM + count,
                learning_rate=self.config.lr,
                lr_scheduler_type="cosine",
                weight_decay=self.config.weight_decay,
                max_grad_norm=self.config.clip,
                bf16=self.how.bf16,
                use_cpu=not torch.cuda.is_available(),
                seed=seed,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
            )
            rows: Any = self.rows
            trainer = Sampled(self.model, arguments, collate, rows, callbacks=[Clock()])
            trainer.remove_callback(_printer())
            trainer.train()
        self.timed += tokens[WARM : WARM + count]
        (wall, cpu), (end, spent) = times[WARM - 1], times[-1]
        return Took((end - wall) / count, (spent - cpu) / count)


def _printer() -> type:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def _base(folder: Path, classes: int, texts: bool) -> tuple[nn.Module, str]:
    """Give a classifier and the path of its list of layers."""
    if not texts:
        base = load_model(folder)
        return Images(base, classes), f"base.{base.blocks}"
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
    return model, f"{model.base_model_prefix}.encoder.layer"


def _row(x: Any, y: Any, texts: bool) -> dict[str, Any]:
    return {"input_ids": x[x >= 0].tolist(), "labels": int(y)} if texts else {"inputs": x, "labels": int(y)}


def _texts(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad to the longest of a batch."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def _images(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    inputs = torch.stack([torch.from_numpy(row["inputs"]) for row in rows])
    return {"inputs": inputs, "labels": torch.tensor([row["labels"] for row in rows])}
