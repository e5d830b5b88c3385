"""Tiny models of ``transformers`` with several different LoRA adapters, for the tests of PEFT in and out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from guarantees import threads
from torch import Tensor, nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
NONE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _bert() -> nn.Module:
    config = transformers.BertConfig(vocab_size=64, max_position_embeddings=32, num_labels=3, **SIZE, **NONE)
    return transformers.BertForSequenceClassification(config)


def _vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SIZE, **NONE))


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, num_key_value_heads=1, bos_token_id=1, eos_token_id=None, pad_token_id=0, **SIZE
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=None,
        pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[list[str], ...]]] = {
    "bert": (_bert, (["query", "value"], ["key", "dense"], ["output.dense", "query"])),
    "vit": (_vit, (["q_proj", "v_proj"], ["k_proj", "o_proj", "fc1"], ["fc2", "q_proj"])),
    "llama": (_llama, (["q_proj", "v_proj"], ["gate_proj", "down_proj"], ["k_proj", "o_proj", "up_proj", "q_proj"])),
    "gpt2": (_gpt2, (["c_attn"], ["c_fc", "attn.c_proj"], ["mlp.c_proj", "c_attn"])),
}
SAVED = {"bert": ["classifier"], "vit": ["classifier"], "llama": None, "gpt2": None}
NAMES = ("ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run so small a model on one thread: a busy machine makes a team of threads wait a thousand times longer."""
    with threads(1):
        yield


def base(kind: str) -> nn.Module:
    """Make the same model every time."""
    torch.manual_seed(1)
    return MODELS[kind][0]().eval()


def adapter_config(kind: str, i: int, **other) -> peft.LoraConfig:
    """Configure the i-th adapter: ranks, alphas, targets, patterns all different; the first may save a module."""
    targets = MODELS[kind][1][i % 3]
    values = {
        "r": (4, 7, 1, 8, 3)[i % 5],
        "lora_alpha": 3 + i,
        "target_modules": targets,
        "use_rslora": i % 2 == 1,
        "init_lora_weights": False,
        "rank_pattern": {targets[0]: 5} if i % 3 == 2 else {},
        "alpha_pattern": {targets[-1]: 9} if i % 3 == 1 else {},
        "modules_to_save": SAVED[kind] if i == 0 else None,
        "fan_in_fan_out": kind == "gpt2",
    }
    return peft.LoraConfig(**{**values, **other})


def adapted(kind: str, count: int, dtype: torch.dtype = torch.float32, seed: int = 0, **other) -> peft.PeftModel:
    """Make a PEFT model with the first adapters, all of them active and trainable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of a second adapter
        model = peft.get_peft_model(base(kind).to(dtype), adapter_config(kind, 0, **other), NAMES[0])
        for i in range(1, count):
            model.add_adapter(NAMES[i], adapter_config(kind, i, **other))
    torch.manual_seed(100 + seed)
    for name, p in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(p, std=0.05 * count**-0.5 if "lora_B" in name else 0.2)  # base and adapters weigh alike
            p.data = p.bfloat16().to(p.dtype)  # no rounding on reading: PEFT runs fp32 adapters over bf16 in fp32
    model.base_model.set_adapter(list(NAMES[:count]))
    return model.eval()


def inputs(kind: str, samples: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(3)
    if kind == "vit":
        return torch.randn(samples, 3, 8, 8, generator=g)
    return torch.randint(2, 64, (samples, 7), generator=g)


def run(model: nn.Module, kind: str, samples: int = 4, **more) -> Tensor:
    """Give the logits, in the type of the model's base."""
    x = inputs(kind, samples)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return model(x.to(dtype) if kind == "vit" else x, **more).logits
