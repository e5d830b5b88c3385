"""Time whole models with adapters under every linear layer: ``python -m bench.end_to_end``; two cores take six minutes.

Two models from ``transformers``, by configuration, of random weights: a 6-layer encoder (hidden 384, 12 heads, as
MiniLM) over 8 sequences of 128 tokens, and a 6-layer decoder (hidden 576, 9 heads, as SmolLM) that reads a prompt of
128 tokens and then 32 more one by one, over a cache of keys and values. Every linear layer has four adapters of rank
16, all active. Rows are tokens a second, in the file of ``bench.run``. Outputs are held against fp64 before they are
timed, and providers take turns.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import s3t_ext
from bench.built import Cannot
from bench.cases import TIMERS
from bench.machine import describe, device_name, threads
from bench.measure import Log
from bench.onednn import PackedLinear
from bench.rows import RESULTS, Row, append
from bench.timing import ROUNDS, shuffled, spread
from bench.truth import TYPES, far

LAYERS, N, RANK, PROMPT, MORE = 6, 4, 16, 128, 32
LEAST = 5  # rounds, where no provider's percentiles are far apart
APART = 4  # times torch's own error: through layers, right sums in another order end further off than in one operator


class Work(NamedTuple):
    """A model and what it is given; ``run`` gives its outputs and the seconds of each part, ``tokens`` its tokens."""

    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], tuple[Tensor, dict[str, float]]]
    tokens: dict[str, int]
    compiles: bool  # in less than a minute: a cache that grows has another shape at every token


def encoder(batch: int) -> Work:
    """Give the encoder over so many sequences."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=12, vocab_size=8192
    )
    ids = torch.randint(config.vocab_size, (batch, PROMPT))  # (B, L)
    part = f"encoder-B{batch}-L{PROMPT}"

    def run(model: nn.Module) -> tuple[Tensor, dict[str, float]]:
        start = time.perf_counter()
        y = model(input_ids=ids).last_hidden_state  # (B, L, 384)
        return y, {part: time.perf_counter() - start}

    return Work(lambda: BertModel(config), run, {part: batch * PROMPT}, True)


def decoder(batch: int) -> Work:
    """Give the decoder over so many sequences; the tokens that it reads are given, so that all compute the same.

    Without the head, which carries no adapter: torch's product of many sequences' last bf16 states with a large
    vocabulary takes a copy of the weight for each, as long as half of all the layers.
    """
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=8192,
    )  # fmt: skip
    ids = torch.randint(config.vocab_size, (batch, PROMPT))  # (B, L)
    more = torch.randint(config.vocab_size, (MORE, batch, 1))
    prefill, decode = f"prefill-B{batch}-L{PROMPT}", f"decode-B{batch}-L{MORE}"

    def run(model: nn.Module) -> tuple[Tensor, dict[str, float]]:
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True)
        middle, states = time.perf_counter(), [out.last_hidden_state]  # (B, L, 576)
        for token in more:
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            states.append(out.last_hidden_state)
        return torch.cat(states, 1), {prefill: middle - start, decode: time.perf_counter() - middle}

    return Work(lambda: LlamaModel(config), run, {prefill: batch * PROMPT, decode: batch * MORE}, False)


def with_peft(model: nn.Module) -> Any:
    """Put N adapters of random weights under every linear layer, all active."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
    names = [f"adapter{n}" for n in range(N)]
    adapted: Any = get_peft_model(model, config, names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        adapted.add_adapter(name, config, autocast_adapter_dtype=False)
    adapted.base_model.set_adapter(names)
    return adapted.eval().requires_grad_(False)


def concatenated(model: Any) -> Any:
    """Sum the adapters of a PEFT model into one of rank N r."""
    model.add_weighted_adapter(list(model.peft_config), [1.0] * N, "cat", combination_type="cat")
    model.base_model.set_adapter("cat")
    return model.eval().requires_grad_(False)


def compiled(model: Any, work: Work) -> Any:
    """Compile the concatenated model, frozen: 1.3 times as fast as PEFT's loop compiled, in both types."""
    import torch._inductor.config

    module: Any = torch.compile(concatenated(model).base_model.model)
    with torch._inductor.config.patch(freezing=True), redirect_stderr(io.StringIO()):
        work.run(module)
    return module


def packed(model: nn.Module, rows: int) -> nn.Module:
    """Put oneDNN's packed products in place of every linear layer and of PEFT's concatenated ones.

    Packed for many rows a weight serves one row as well; packed for one it is slow at many.
    """
    for name, child in model.named_children():
        if hasattr(child, "base_layer"):
            a, b = child.lora_A["cat"].weight, child.lora_B["cat"].weight * child.scaling["cat"]  # (R, K), (O, R)
            setattr(model, name, PackedLinear(child.base_layer, rows, a, b))
        elif isinstance(child, nn.Linear):
            setattr(model, name, PackedLinear(child, rows))
        else:
            packed(child, rows)
    return model


def providers(work: Work, base: nn.Module, peft: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name the ways to run a model and how each is made. Those of ``bare`` are what merging the adapters would give."""
    rows = max(work.tokens.values())
    yield "bare", lambda: base
    yield "bare-onednn", lambda: packed(copy.deepcopy(base), rows)
    yield "peft", lambda: peft
    yield "cat", lambda: concatenated(copy.deepcopy(peft))
    if work.compiles:
        yield "compile_cat", lambda: compiled(copy.deepcopy(peft), work)
    yield "onednn", lambda: packed(concatenated(copy.deepcopy(peft)).base_model.model, rows)
    yield "ours-exact", lambda: s3t_ext.from_peft(copy.deepcopy(peft), mode="exact")
    yield "ours-fast", lambda: s3t_ext.from_peft(copy.deepcopy(peft), mode="fast")


class Model(NamedTuple):
    """A model in one type, plain and with adapters, and of each what it gives in this type and in fp64."""

    dtype: str
    base: nn.Module
    peft: Any
    truth: dict[str, tuple[Tensor, Tensor]]  # of "bare", and of "adapted"


def draw(work: Work, dtype: str) -> Model:
    """Draw the weights of a model and compute what is right."""
    torch.manual_seed(0)
    base = work.build().to(TYPES[dtype]).eval().requires_grad_(False)
    peft = with_peft(copy.deepcopy(base))
    both = {"bare": base, "adapted": peft}
    return Model(
        dtype, base, peft, {n: (work.run(m)[0], work.run(copy.deepcopy(m).double())[0]) for n, m in both.items()}
    )


def right(work: Work, model: Model, log: Log) -> dict[str, Any]:
    """Make all providers' models; give those whose outputs are right."""
    found, part = {}, f"{next(iter(work.tokens))}-{model.dtype}"
    for name, make in providers(work, model.base, model.peft):
        try:
            made = make()
            same, exact = model.truth["bare" if name.startswith("bare") else "adapted"]
            fault = far(work.run(made)[0], same, exact, times=APART)
        except Cannot as why:
            log.declined[name, str(why)] = log.declined.get((name, str(why)), 0) + 1
            continue
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if fault:
            log.fail(f"{name} on {part}: {fault}")
        else:
            found[name] = made
    return found


def measure(work: Work, model: Model, rounds: int, log: Log) -> Iterator[Row]:
    """Check all providers of a model, then time those that are right, in turn."""
    models = right(work, model, log)
    rates: dict[tuple[str, str], list[float]] = {(part, name): [] for part in work.tokens for name in models}
    for turn in range(rounds):
        if turn >= LEAST and all(s.p80 < 1.1 * s.p20 for s in map(spread, rates.values())):
            break
        for name in shuffled(models, turn):
            for part, seconds in work.run(models[name])[1].items():
                rates[part, name].append(work.tokens[part] / seconds)
    for (part, name), found in rates.items():
        times = spread(found)
        row: dict[str, object] = {"case": f"{part}-{model.dtype}", "provider": name, "r": RANK, "N": N}
        row |= {p: f"{getattr(times, p):.2f}" for p in ("p20", "p50", "p80")} | {"dtype": model.dtype}
        mode = name.partition("-")[2] if name.startswith("ours") else ""
        yield row | {"mode": mode, "metric": "tokens", "unit": "1/s", "repeats": len(found)}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.end_to_end", description=__doc__)
    p.add_argument("--timers", nargs="+", choices=TIMERS["cpu"], default=TIMERS["cpu"], help="one thread, or all")
    p.add_argument("--types", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    p.add_argument(
        "--rounds",
        type=int,
        default=ROUNDS,
        help=f"turns of each provider; default: {ROUNDS}, and {LEAST} where times are steady",
    )
    p.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = p.parse_args(argv)
    path, log = args.out / f"{device_name('cpu')}.csv", Log()
    common = describe("cpu", "bench.end_to_end")
    for make, dtype in itertools.product((lambda: encoder(8), lambda: decoder(1), lambda: decoder(8)), args.types):
        torch.set_num_threads(threads("all"))
        with torch.no_grad():
            work = make()
            model = draw(work, dtype)
            for timer in args.timers:
                torch.set_num_threads(threads(timer))
                rows = [{**row, "timer": timer} for row in measure(work, model, args.rounds, log)]
                for row in rows:
                    row["case"] = f"{row['case']}-{timer}"
                    print(f"{row['case']:28} {row['provider']:12} {row['p50']:>10} tokens a second", flush=True)
                append(path, [row | common for row in rows])
    print(f"rows appended to {path}; the table: python -m bench.plot {path}")
    print(log)
    return int(bool(log.failures))


if __name__ == "__main__":
    sys.exit(main())
