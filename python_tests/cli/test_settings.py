"""``--memory`` bounds what training holds, as the operating system counts it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

from s3t_ext.models.folder import build, save_model

RUN = """
import json, resource, sys
import torch
torch.set_num_threads(1)
from s3t_ext.cli import main
from s3t_ext.system.training.budget import peak_bytes
from s3t_ext.system.training.train import Trainer
begin = Trainer.train
def train(self, *given):
    train.before = peak_bytes()
    return begin(self, *given)
Trainer.train = train
assert main.main(sys.argv[1:]) == 0
print(json.dumps({"before": train.before, "after": peak_bytes()}))
"""


def test_the_peak_of_training_keeps_to_the_memory_that_is_given(tmp_path) -> None:
    """Seen: 60 of 64 MiB, and 138 where 200 are given."""
    mib = 64
    arguments = {"shape": [3, 32, 32], "patch": 4, "width": 128, "depth": 4}
    save_model(tmp_path / "base", build("vit", arguments), "vit", arguments)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (600, 3, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "t.npz", subject=np.arange(600), input=images, label=rng.choice(["a", "b"], 600))
    schema = {"classes": ["a", "b"], "shape": [3, 32, 32], "numbers": "uint8", "scale": 1 / 255}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    words = ["fit", "store", "t.npz", "--schema", "s.json", "--model", "base", "--shards", "6", "--slices", "2"]
    words += ["--steps", "1", "--lanes", "1", "--strategy", "sisa", "--memory", str(mib / 1024), "--json"]
    done = subprocess.run([sys.executable, "-c", RUN, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["after"] - told["before"] <= 1.25 * mib * 2**20
