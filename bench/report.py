"""What a run prints: the machine's ceilings, and each provider's time against the bare product's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bench.cases import Case, parse

Row = Mapping[str, object]

LEGEND = """
bare_us: microseconds of the plain layer (F.linear). The other columns: time of the layer with its adapters over that of
the plain one. 1.00 would be adapters for free; below `floor` gets only who multiplies faster than F.linear. auto-exact
and auto-fast are ours (-packed: over s3t_ext.pack(weight)), then ours by backend; peft is PEFT itself, naive its loop
in plain torch, cat its adapters concatenated, three_calls one product over all adapters, a mask and addmm, onednn the
same in products over weights packed by oneDNN, by_group two products a group, padded two batched ones, compile
torch.compile of naive and of cat, frozen.
"""


def ceilings(rows: Iterable[Row]) -> str:
    """One line for each way of timing."""
    lines: dict[object, list[str]] = {}
    for row in rows:
        lines.setdefault(row["timer"], []).append(f"{row['provider']} {float(str(row['p50'])):.4g} {row['unit']}")
    return "\n".join(f"ceilings ({timer}): {', '.join(parts)}" for timer, parts in lines.items())


def ratios(rows: Iterable[Row]) -> str:
    """A table, one line a case and one column a provider; and whether the machine was too busy to trust it."""
    rows = list(rows)
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        times.setdefault(str(row["case"]), {})[str(row["provider"])] = float(str(row["p50"]))
    names = list(dict.fromkeys(name for found in times.values() for name in found if name != "bare"))
    wide = max((len(case) for case in times), default=4)
    lines = [
        LEGEND.strip(),
        "",
        f"{'case':{wide}} {'bare_us':>9} {'floor':>6} " + " ".join(f"{n:>{_wide(n)}}" for n in names),
    ]
    for case, found in times.items():
        bare = found.get("bare", float("nan"))
        cells = [f"{found[n] / bare:.2f}" if n in found else "-" for n in names]
        start = f"{case:{wide}} {bare:9.1f} {_floor(parse(case)):6.2f} "
        lines.append(start + " ".join(f"{cell:>{_wide(n)}}" for cell, n in zip(cells, names)))
    return "\n".join([*lines, *_sentence(times), *_noise(rows)])


def _noise(rows: list[Row]) -> list[str]:
    """Warn where many rows spread widely: something else was running."""
    wide = sum(float(str(row["p80"])) > 1.5 * float(str(row["p20"])) for row in rows)
    if wide * 5 < max(len(rows), 1):
        return []
    return [f"\nNOISY: in {wide} of {len(rows)} rows p80 is above 1.5 x p20; measure again on an idle machine."]


def _wide(name: str) -> int:
    return max(len(name), 5)


def _floor(case: Case) -> float:
    from bench.roofline import floor

    return floor(case)


def _sentence(times: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Say what the first routed case means."""
    for name, found in times.items():
        case = parse(name)
        ours = [found[n] for n in found if n.startswith("auto-")]
        others = {n: found[n] for n in ("naive", "peft", "three_calls") if n in found}
        if case.G > 1 and ours and others and "bare" in found:
            return [
                f"\n{case.T} rows of {case.G} ensemble members, {case.P} adapter(s) each: ours {min(ours):.0f} us, "
                + ", ".join(f"{n} {t:.0f} us" for n, t in others.items())
                + f", the plain layer {found['bare']:.0f} us."
            ]
    return []
