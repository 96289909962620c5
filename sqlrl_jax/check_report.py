"""The findings of `launch.py check` as tables for people and as one JSON object for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from sqlrl_jax.check import Findings, Proof, Sending, proof_as_dict
from sqlrl_jax.display import Display
from sqlrl_jax.suggest import Change
from sqlrl_jax.topology import Slice

_GIB = 2.0**30


def show(findings: Findings) -> None:
    """Prints everything, the verdict last."""
    display = Display()
    display.print(_costs(findings))
    display.print(_memory(findings))
    if findings.proof is not None:
        display.print(_programs(findings.proof))
        if findings.proof.sending is not None:
            display.print(_sending(findings.proof.sending))
    if findings.table:
        display.print(_slices(findings))
    for refused in (p.refused for p in findings.proof.programs if p.refused) if findings.proof else ():
        display.print(f"the compiler: {refused}")
    display.print(verdict(findings), style="bold green" if findings.fits else "bold red")
    for change in findings.suggestions:
        display.print("  " + line_of(change))
    if not findings.fits and findings.where is not None and not findings.suggestions:
        display.print("  no change of settings or slice was found that fits")


def verdict(findings: Findings) -> str:
    """The last line: does it fit, and by what margin."""
    if findings.where is None:
        good = smallest(findings.table)
        if not good:
            return "by estimate it fits no known slice with this mesh"
        return f"by estimate it fits {', '.join(good)} and larger; --topology NAME asks the compiler"
    hbm = findings.where.generation.hbm
    text = f"{_gib(findings.needs)} of {_gib(hbm)} GiB a device on {findings.where.name}"
    if findings.fits:
        return f"fits: {text}"
    return f"does not fit: {text}" + ("; by estimate these would:" if findings.suggestions else "")


def smallest(table: list[tuple[Slice, float]]) -> list[str]:
    """Of each generation the smallest slice that fits, by name."""
    found: dict[str, str] = {}
    for where, needs in table:
        if needs <= where.generation.hbm:
            found.setdefault(where.name.partition(":")[0], where.name)
    return list(found.values())


def line_of(change: Change) -> str:
    """A suggestion as words and as what to type."""
    settings = " ".join(f"{key}={str(value).lower()}" for key, value in change.settings)
    return f"{change.kind} ({_gib(change.needs)} GiB): --topology {change.where.name} {settings}".rstrip()


def _gib(count: float) -> str:
    return f"{count / _GIB:.1f}"


def _si(count: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def _grid(title: str, rows: Sequence[tuple[str, ...]], *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", show_header=bool(columns))
    for i, name in enumerate(columns or ("",) * len(rows[0])):
        table.add_column(name, justify="left" if i == 0 or not columns else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _costs(findings: Findings) -> Table:
    cost, flops, step = findings.cost, findings.cost.flops(), findings.cost.step()
    mesh = ", ".join(f"{axis} {size}" for axis, size in cost.sizes.items() if size > 1) or "one device"
    rows = [
        ("model", f"{findings.model_name}, {_si(cost.parameters)} parameters, {_si(cost.trained_parameters)} trained"),
        ("mesh", f"{mesh}: {cost.devices} devices"),
        (
            "micro-batch",
            f"{cost.policy.rows_per_micro_batch} rows of {cost.policy.row_tokens} = {cost.tokens} tokens",
        ),
        *_shorter_rows(findings),
        (
            "assumed",
            f"episodes of {cost.episodes.tokens} tokens, {cost.episodes.trained_share:.0%} of them trained",
        ),
        (
            "FLOPs a micro-batch",
            f"{_si(flops.matrices)} with weights ({flops.matrices / flops.six_n:.2f} of 6·N·tokens), "
            f"{_si(flops.attention)} attention; {flops.spent / flops.needed:.2f} of what is needed",
        ),
        (
            "a training step",
            f"{step.episodes} episodes, {_si(step.tokens)} tokens, {step.micro_batches} micro-batches, "
            f"{_si(step.flops)} FLOPs, {_si(step.bytes)}B of HBM traffic a device",
        ),
    ]
    if findings.where is not None:
        seconds = step.flops / cost.devices / findings.where.generation.flops
        rows.append(("at the slice's peak", f"{seconds:.0f} s a training step"))
    return _grid("by arithmetic", rows)


def _shorter_rows(findings: Findings) -> list[tuple[str, str]]:
    """What trainer.policy.row_buckets adds. Nothing else here counts it: the longest rows need the most memory."""
    cost = findings.cost
    shapes = [f"{cost.tokens // length} of {length}" for length in cost.policy.buckets]
    said = f"{', '.join(shapes)}: a program more for each, no more memory, less attention"
    return [("or in rows", said)] if shapes else []


def _memory(findings: Findings) -> Table:
    parts = asdict(findings.cost.memory())
    rows = [(name, _gib(value)) for name, value in parts.items() if value] + [("total", _gib(sum(parts.values())))]
    return _grid("memory of a device, estimated", rows, "what", "GiB")


def _programs(proof: Proof) -> Table:
    rows = [
        (p.name, _gib(p.own), _gib(p.temporary), _gib(p.resident), _gib(p.needs), f"{p.seconds:.0f} s")
        for p in proof.programs
    ]
    title = "memory of a device, compiled, GiB"
    return _grid(title, rows, "function", "own", "of it temporary", "held beside", "needs", "compiled in")


def _sending(sending: Sending) -> Table:
    rows = []
    for axes in dict.fromkeys([*sending.ideal, *sending.measured]):
        measured, ideal = sending.measured.get(axes, 0.0), sending.ideal.get(axes, 0.0)
        if max(measured, ideal) > 1e6:
            rows.append((axes, f"{measured / _GIB:.2f}", f"{ideal / _GIB:.2f}", _ratio(measured, ideal)))
    measured, ideal = sum(sending.measured.values()), sum(sending.ideal.values())
    rows.append(("all", f"{measured / _GIB:.2f}", f"{ideal / _GIB:.2f}", _ratio(measured, ideal)))
    return _grid("sent by a device for a micro-batch, GiB", rows, "over", "compiled", "ideal", "ratio")


def _ratio(measured: float, ideal: float) -> str:
    return f"{measured / ideal:.2f}" if ideal else "–"


def _slices(findings: Findings) -> Table:
    """Of each generation the slices up to the first that fits."""
    rows, done = [], set()
    for where, needs in findings.table:
        fits, kind = needs <= where.generation.hbm, where.name.partition(":")[0]
        if kind not in done:
            hbm = _gib(where.generation.hbm)
            rows.append((where.name, str(where.devices), _gib(needs), hbm, "yes" if fits else "no"))
        done |= {kind} if fits else set()
    return _grid("known slices, estimated", rows, "slice", "devices", "GiB a device", "of", "fits")


def as_json(findings: Findings) -> dict[str, Any]:
    """Everything, in bytes, FLOPs and seconds."""
    cost, flops = findings.cost, findings.cost.flops()
    out: dict[str, Any] = {
        "model": findings.model_name,
        "parameters": cost.parameters,
        "trained_parameters": cost.trained_parameters,
        "mesh": cost.sizes,
        "devices": cost.devices,
        "assumed": asdict(cost.episodes),
        "micro_batch": {
            "rows": cost.policy.rows_per_micro_batch,
            "tokens": cost.tokens,
            "row_buckets": list(cost.policy.buckets),
            "flops": {**asdict(flops), "spent": flops.spent},
            "ideal_sent_bytes_per_device": cost.ideal_sent(),
        },
        "step": asdict(cost.step()),
        "estimated_memory": {**asdict(cost.memory()), "total": cost.memory().total},
        "fits": findings.fits,
        "suggestions": [
            {
                "kind": s.kind,
                "topology": s.where.name,
                "settings": dict(s.settings),
                "needs_bytes_per_device": s.needs,
            }
            for s in findings.suggestions
        ],
    }
    if findings.where is not None:
        generation = findings.where.generation
        out["topology"] = {
            "name": findings.where.name,
            "hbm_bytes_per_device": generation.hbm,
            "peak_flops": generation.flops,
        }
    else:
        out["slices"] = [
            {"name": s.name, "devices": s.devices, "needs_bytes_per_device": n, "fits": n <= s.generation.hbm}
            for s, n in findings.table
        ]
    if findings.proof is not None:
        out["compiled"] = proof_as_dict(findings.proof)
    return out
