"""A plan as text."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from draftopd.planning.devices import Assumptions
from draftopd.planning.run import Run

GIB = 2**30


def print_plan(run: Run, given: Assumptions, source: str, console: Console | None = None) -> None:
    """Print memory by phase and part, time by part, and whether the run fits."""
    console = console or Console(highlight=False)
    t, d, step = run.target, run.drafter, run.step
    active = f", {t.active_elements / 1e9:.2f} B active in its layers" if t.experts else ""
    console.print(
        f"target    {source}: {t.elements / 1e9:.2f} B weights{active}, {8 * t.width_bytes} bit", soft_wrap=True
    )
    console.print(f"drafter   {d.kind}, {d.elements / 1e9:.3f} B trained weights, blocks of {d.block}")
    shared = "layers sharded" if run.sharing.shards > 1 else "whole target on each"
    console.print(f"devices   {run.devices} x {given.gpu}, {shared}")
    console.print(
        f"step      {step.batch} texts of up to {step.tokens:,} tokens, {step.anchors:,} anchors each; attention of "
        f"the drafter: {step.attention}", soft_wrap=True,
    )  # fmt: skip
    console.print(_memory(run))
    console.print(_time(run, given))
    for line in verdict(run, given):
        console.print(line, soft_wrap=True)
    console.print(
        f"Estimates. Assumed: {given.utilisation:.0%} of peak arithmetic, {given.bandwidth_utilisation:.0%} of "
        f"bandwidth, {given.launch_ms} ms of the host per layer, tau {given.tau}, {given.headroom:.0%} of memory left "
        f"free, texts of {run.mean_prompt} + {run.mean_response} tokens on average; set them with plan.NAME=VALUE.",
        soft_wrap=True,
    )


def _memory(run: Run) -> Table:
    table = Table(title="Memory of one process, GiB", title_justify="left")
    table.add_column("part")
    phases = run.phases()
    for phase in phases:
        table.add_column(f"{phase.name}\n({phase.peak.name})", justify="right")
    resident = run.resident()
    for name, size in resident.items():
        table.add_row(name, *[_gib(size)] * len(phases))
    for name in dict.fromkeys(name for phase in phases for name in phase.peak.parts):
        table.add_row(name, *(_gib(phase.peak.parts[name]) if name in phase.peak.parts else "" for phase in phases))
    held = sum(resident.values())
    table.add_section()
    table.add_row("peak", *(_gib(held + phase.peak.bytes) for phase in phases))
    return table


def _time(run: Run, given: Assumptions) -> Table:
    table = Table(title="Time", title_justify="left")
    for name in ("part", "TFLOP", "seconds"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, part in run.step_work().items():
        if part.seconds(given):
            table.add_row(f"step: {name}", f"{part.operations / 1e12:,.2f}", f"{part.seconds(given):,.3f}")
    table.add_section()
    for name, seconds in run.seconds(given).items():
        table.add_row(f"run: {name}", "", f"{seconds:,.0f}")
    return table


def verdict(run: Run, given: Assumptions) -> list[str]:
    """Steps, tokens, hours, whether the run fits, and which changes would make it fit."""
    batches = run.batches * run.epochs
    tokens = batches * run.devices * run.mean.batch * run.mean.tokens
    hours = sum(run.seconds(given).values()) / 3600
    lines = [
        f"{batches // run.accumulate:,} optimizer steps, {tokens / 1e6:,.1f} M recorded tokens, "
        f"{hours:,.2f} hours, {hours * run.devices:,.2f} GPU hours"
    ]
    limit = given.device.memory * 1e9 * (1 - given.headroom)
    peak = run.peak()
    room = f"of {_gib(given.device.memory * 1e9)}, {_gib(limit)} of which can be used"
    if peak <= limit:
        return [*lines, f"Fits: {_gib(peak)} GiB at most, {room}."]
    lines.append(f"Does not fit: {_gib(peak)} GiB, {room}. These changes would help, each on top of those before:")
    for change, changed in run.to_fit(limit):
        peak = changed.peak()
        lines.append(f"  {change}: {_gib(peak)} GiB{', fits' if peak <= limit else ''}")
    if peak > limit:
        lines.append("  None of these is enough: use a GPU with more memory (plan.gpu).")
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"
