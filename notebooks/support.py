"""What the notebooks share: settings, the bundled models, tables and drawing. Import it before other modules."""

from __future__ import annotations

from draftopd.cli.quiet import quiet

quiet()

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from IPython import get_ipython
from IPython.display import HTML, Markdown
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Patch
from transformers import PreTrainedTokenizerBase

import draftopd
from draftopd.bundled.problems import Split
from draftopd.data.prompts import PromptEncoder, ReasoningPrompts
from draftopd.decoding.draft_text import LEGEND, STYLE, as_html, blocks_of
from draftopd.decoding.generate import Decoded, Decoder
from draftopd.decoding.rules import Rules
from draftopd.drafters.base import Drafter
from draftopd.drafters.load import load_for
from draftopd.evaluation.plots import COLOURS
from draftopd.evaluation.statistics import Interval
from draftopd.losses.base import Loss
from draftopd.targets.load import load_target, load_tokenizer, stop_tokens
from draftopd.targets.target import Target

ROOT = Path(draftopd.__file__).parents[2]
GREY = "#888888"
#: The colours that a drafter or a run has in all figures.
COLOUR_OF = {"SFT": COLOURS[0], "on-policy": COLOURS[1], "plain": "black", "fixed": COLOURS[2], "broken": GREY}

# SVG without a date and with fixed ids, so that another run of the same code gives the same file.
shell = get_ipython()
shell.run_line_magic("config", 'InlineBackend.figure_formats = ["svg"]')
shell.run_line_magic("config", 'InlineBackend.print_figure_kwargs = {"metadata": {"Date": None}}')
plt.rcParams.update({
    "figure.constrained_layout.use": True, "figure.constrained_layout.wspace": 0.05, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "svg.hashsalt": "draftopd",
})  # fmt: skip


class Bundled(NamedTuple):
    """The bundled target, its drafters by name, and the rules of greedy decoding."""

    target: Target
    tokenizer: PreTrainedTokenizerBase
    drafters: dict[str, Drafter]
    rules: Rules


def bundled() -> Bundled:
    """The bundled target with the drafter of SFT and the one that on-policy training continued from it."""
    path = "bundled:tiny_target"
    target, tokenizer = load_target(path, dtype="float32"), load_tokenizer(path)
    checkpoints = {"SFT": "bundled:tiny_dflash", "on-policy": "bundled:tiny_dflash_opd"}
    drafters = {name: load_for(target, checkpoint).eval() for name, checkpoint in checkpoints.items()}
    return Bundled(target, tokenizer, drafters, Rules(stop=stop_tokens(target, tokenizer), max_new_tokens=256))


def encoded(tokenizer: PreTrainedTokenizerBase, count: int, split: Split = "test") -> list[list[int]]:
    """The first bundled problems of a split, as token ids."""
    return PromptEncoder(tokenizer).take(ReasoningPrompts(split), range(count))


def decode(target: Target, drafter: Drafter | None, prompts: list[list[int]], rules: Rules) -> list[Decoded]:
    """Decoded texts in the order of the prompts; without a drafter the target makes one token per pass."""
    return [text for texts in Decoder(target, drafter, rules).decode(prompts, batch_size=64) for text in texts]


def counts(decodes: Iterable[Decoded]) -> list[tuple[int, int]]:
    """Emitted tokens and verifications of each text: what intervals of tau are made from."""
    return [(sum(d.emitted), len(d.emitted)) for d in decodes]


def shown(found: Interval | Sequence[float], form: str = ".2f") -> str:
    """A value with its 95 % interval."""
    return "{:{form}} [{:{form}}, {:{form}}]".format(*found, form=form)


def table(headings: str, rows: Iterable[Sequence[object]]) -> Markdown:
    """A Markdown table.

    Args:
        headings: separated by ``|``; a column whose heading ends with ``:`` is aligned to the right.
    """
    names = headings.split("|")
    lines = [[name.rstrip(":") for name in names], ["--:" if name.endswith(":") else "---" for name in names]]
    lines += [[str(cell) for cell in row] for row in rows]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def visible(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token's text, with marks for a line break and, in a token of nothing else, for spaces."""
    text = tokenizer.decode([token])
    return text.strip() or text.replace("\n", "⏎").replace(" ", "␣")


def side_by_side(decodes: Mapping[str, Decoded], tokenizer: PreTrainedTokenizerBase) -> HTML:
    """Drafted texts beside one another, with their number of verifications and tau."""
    columns = "".join(
        f'<div style="flex: 1 1 20rem"><p><b>{name}</b>: {len(d.anchors)} verifications, tau '
        f"{d.acceptance_length:.2f}</p>{as_html(blocks_of(d, tokenizer))}</div>"
        for name, d in decodes.items()
    )
    return HTML(f'<style>{STYLE}</style>{LEGEND}<div style="display: flex; flex-wrap: wrap; gap: 1rem">{columns}</div>')


def draw_blocks(decoded: Decoded, count: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """The first blocks of a text, one per row: anchor, proposals, the target's own token."""
    kinds = {
        "anchor": COLOURS[5], "accepted proposal": COLOURS[2], "rejected proposal": "#dddddd",
        "correction or bonus": COLOURS[4],
    }  # fmt: skip
    figure, panel = plt.subplots(figsize=(8.2, 0.32 * count + 0.6))

    def cell(x: float, y: int, token: int, kind: str) -> None:
        rejected = kind == "rejected proposal"
        box = FancyBboxPatch((x + 0.06, y + 0.12), 0.88, 0.76, boxstyle="round,pad=0,rounding_size=0.12", lw=0)
        panel.add_patch(box)
        box.set(facecolor=kinds[kind], alpha=0.3 if rejected else 0.45)
        panel.text(
            x + 0.5, y + 0.52, visible(tokenizer, token), ha="center", va="center", fontsize=8.5,
            family="DejaVu Sans Mono", color=GREY if rejected else "black",
        )  # fmt: skip
        if rejected:
            panel.plot([x + 0.2, x + 0.8], [y + 0.5, y + 0.5], color=GREY, lw=0.8)

    slots = len(decoded.proposals[0])
    for y in range(count):
        anchor, n = decoded.anchors[y], decoded.accepted[y]
        cell(0, y, decoded.tokens[anchor], "anchor")
        for slot, token in enumerate(decoded.proposals[y], start=1):
            cell(slot, y, token, "accepted proposal" if slot <= n else "rejected proposal")
        if decoded.emitted[y] > n:
            cell(slots + 1.3, y, decoded.tokens[anchor + n + 1], "correction or bonus")
    panel.set(xlim=(0, slots + 2.3), ylim=(count, 0), ylabel="block and the index of its anchor")
    columns = ["anchor", *map(str, range(1, slots + 1)), "target's\nown"]
    panel.set_xticks([*(k + 0.5 for k in range(slots + 1)), slots + 1.8], columns)
    starts = [anchor - len(decoded.prompt) for anchor in decoded.anchors[:count]]
    panel.set_yticks([y + 0.5 for y in range(count)], [f"{y}, at {start}" for y, start in enumerate(starts, start=1)])
    panel.xaxis.tick_top()
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    patches = [Patch(facecolor=fill, alpha=0.45, label=name) for name, fill in kinds.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=4)
    plt.show()


def panels(width: float, height: float, columns: int = 2, rows: int = 1, **options: Any) -> Any:
    """A new figure's panels: one, or an array of them."""
    return plt.subplots(rows, columns, figsize=(width, height), **options)[1]


def show(legend: Axes | None = None, at: str = "outside lower center") -> None:
    """End a figure; ``legend`` is the panel whose labels explain all panels."""
    if legend is not None:
        handles, labels = legend.get_legend_handles_labels()
        plt.gcf().legend(handles, labels, loc=at, ncols=len(labels))
    plt.show()


def bars(panel: Axes, groups: Mapping[str, Any], labels: Sequence[str], lying: bool = False) -> None:
    """A group of bars for each label, with one bar per name; ``lying`` draws them from left to right."""
    for number, (name, heights) in enumerate(groups.items()):
        x = np.arange(len(labels)) + 0.4 * (number - (len(groups) - 1) / 2)
        (panel.barh if lying else panel.bar)(x, heights, 0.37, color=COLOUR_OF.get(name, COLOURS[number]), label=name)
    _name(panel, labels, lying)


def intervals(panel: Axes, groups: Mapping[str, Any], labels: Sequence[str], lying: bool = False, **style: Any) -> None:
    """For each label one value with its interval per name; ``fmt="o-"`` joins the values of a name.

    Args:
        groups: by name, a ``(value, low, high)`` for each label, all NaN where there is none.
    """
    for number, (name, found) in enumerate(groups.items()):
        values, low, high = np.array(found, dtype=float).T
        x = np.arange(len(labels)) + 0.12 * (number - (len(groups) - 1) / 2)
        drawn = {"fmt": "o", "ms": 4, "lw": 1.2, "capsize": 2.5, "color": COLOUR_OF.get(name, COLOURS[number])} | style
        errors = {"xerr" if lying else "yerr": [values - low, high - values]}
        panel.errorbar(*((values, x) if lying else (x, values)), **errors, **drawn, label=name)
    _name(panel, labels, lying)


def _name(panel: Axes, labels: Sequence[str], lying: bool) -> None:
    if lying:
        panel.set_yticks(range(len(labels)), labels)
        panel.set_ylim(len(labels) - 0.4, -0.6)
    else:
        panel.set_xticks(range(len(labels)), labels)


def draw_progress(panel: Axes, decodes: Mapping[str, Decoded]) -> None:
    """Tokens of one response against the passes that made them."""
    for name, decoded in decodes.items():
        reached = np.cumsum([1, *decoded.emitted])
        label = f"{name}, {len(reached) - 1} passes"
        panel.step(range(len(reached)), reached, where="post", color=COLOUR_OF[name], lw=1.4, label=label)
    panel.legend(loc="lower right", fontsize=9)
    panel.set(xlabel="target passes after the prompt's", ylabel="tokens of the response", title="one prompt")
    panel.set(xlim=(0, None), ylim=(0, None))


def draw_pairs(panel: Axes, values: Mapping[str, Sequence[float]], what: str) -> None:
    """One point per prompt: its value with one drafter against its value with the other."""
    (first, x), (second, y) = values.items()
    ends = (min(*x, *y) - 0.2, max(*x, *y) + 0.2)
    panel.axline((ends[0], ends[0]), slope=1, color="black", lw=0.8, ls=":")
    panel.plot(x, y, "o", color=COLOURS[0], alpha=0.7, markeredgewidth=0, ms=5)
    panel.set(xlabel=f"{what}, {first}", ylabel=f"{what}, {second}", title=f"{len(x)} prompts")
    panel.set(aspect="equal", xlim=ends, ylim=ends)
    whole = range(int(np.ceil(ends[0])), int(ends[1]) + 1)
    panel.set_xticks(whole)
    panel.set_yticks(whole)


def stack(panel: Axes, parts: Mapping[str, Any], x: Any) -> None:
    """Bars at ``x`` that are made of several parts."""
    bottom = np.zeros(len(x))
    for (name, heights), colour in zip(parts.items(), ("#bbbbbb", COLOURS[4], COLOURS[3])):
        panel.bar(x, heights, 0.8, bottom, color=colour, label=name)
        bottom = bottom + np.asarray(heights)


def curves(panel: Axes, groups: Mapping[str, Any]) -> None:
    """By name, the mean of curves ``[seeds, points, (x, y)]``, and each seed's curve behind it."""
    for (name, points), colour in zip(groups.items(), COLOURS):
        panel.plot(*points.mean(0).T, "o-", ms=3, color=colour, label=name)
        for seed in points:
            panel.plot(*seed.T, lw=0.7, alpha=0.4, color=colour)


def draw_gains(gains: Mapping[str, Sequence[float]], edge: float) -> None:
    """Gains with intervals, sorted; those below ``edge`` are written at the left edge instead of drawn."""
    ordered = sorted(gains.items(), key=lambda item: item[1][0])
    panel = panels(8.2, 0.2 * len(ordered) + 0.8, columns=1)
    for y, (_, found) in enumerate(ordered):
        value, low, high = (100 * v for v in found)
        colour = COLOURS[2] if low > 0 else COLOURS[1] if high < 0 else GREY
        if value < 100 * edge:
            panel.text(100 * edge, y, f"◀ {value:.0f} %", va="center", fontsize=8, color=colour)
        else:
            panel.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", ms=4, capsize=2, color=colour)
    panel.axvline(0, color="black", lw=0.8)
    panel.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=8)
    panel.set(xlabel="test tau over the default's (%), 95 % interval", xlim=(100 * edge - 0.3, None))
    panel.set_ylim(-0.7, len(ordered) - 0.3)
    plt.show()


def draw_matrix(values: Any, names: Sequence[str], what: str) -> None:
    """A symmetric matrix of values between -1 and 1, with numbered rows."""
    panel = panels(7.4, 5.2, columns=1)
    image = panel.imshow(values, vmin=-1, vmax=1, cmap="PuOr_r")
    for i, j in np.ndindex(*values.shape):
        colour = "white" if abs(values[i, j]) > 0.7 else "black"
        panel.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=7, color=colour)
    panel.set_xticks(range(len(names)), range(1, len(names) + 1))
    panel.set_yticks(range(len(names)), [f"{name}  {i}" for i, name in enumerate(names, start=1)], fontsize=8)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    panel.figure.colorbar(image, label=what, shrink=0.8)
    plt.show()


def draw_anchors(rollouts: Mapping[str, Sequence[Decoded]], count: int) -> None:
    """A mark at each anchor of the first texts, with a row for each drafter."""
    panel = panels(8.2, 2.8, columns=1)
    for offset, (name, decodes) in zip((-0.19, 0.19), rollouts.items()):
        marks = [(a - len(d.prompt), row + offset) for row, d in enumerate(decodes[:count], start=1) for a in d.anchors]
        strokes = [point for x, y in marks for point in ((x, y - 0.17), (x, y + 0.17), (np.nan, np.nan))]
        panel.plot(*zip(*strokes), lw=1.3, solid_capstyle="butt", color=COLOUR_OF[name], label=name)
    ends = [len(d.response) for d in decodes[:count]]
    panel.plot(ends, range(1, count + 1), ">", ms=4, color=GREY, label="end of the text")
    panel.set(xlabel="token of the response", ylabel="prompt", ylim=(count + 0.6, 0.4), xlim=(-1, None))
    panel.set_yticks(range(1, count + 1))
    show(panel, "outside upper right")


def configured(name: str, yaml: str, function: Callable[..., Any]) -> Any:
    """The loss of ``python train.py loss=NAME``, for this function in ``losses/NAME.py`` and this YAML."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    module = ModuleType(f"draftopd.losses.{name}")
    setattr(module, function.__name__, function)
    sys.modules[module.__name__] = module
    with TemporaryDirectory() as folder:
        (Path(folder) / "loss").mkdir()
        (Path(folder) / "loss" / f"{name}.yaml").write_text(yaml)
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return instantiate(compose("train", [f"loss={name}", f"hydra.searchpath=[file://{folder}]"]).loss)


class Run(NamedTuple):
    """Tokens emitted by each block of each test prompt, and the mean accepted length in each training step."""

    emitted: list[list[int]]
    accepted: list[float]


def train(models: Bundled, drafter: Drafter, loss: Loss, epochs: int) -> Run:
    """A short run: in each epoch a speculative rollout of 24 prompts and 8 steps of 8 texts; then 32 test prompts."""
    import lightning as L

    from draftopd.rollout.rollouts import SpeculativeRollout
    from draftopd.training.datamodule import ReplayDataModule
    from draftopd.training.module import DraftModule
    from draftopd.training.optimizers import adamw
    from draftopd.training.refresh import RefreshAnchors

    accepted: list[float] = []

    class Accepted(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            accepted.append(float(trainer.callback_metrics["train/accepted_length"]))

    L.seed_everything(0, verbose=False)
    data = ReplayDataModule(
        ReasoningPrompts("train"), ReasoningPrompts("validation"), prompts_per_refresh=24, validation_count=1,
        batch_size=8, batches_per_epoch=8, test_prompts=ReasoningPrompts("test"), test_count=32,
    )  # fmt: skip
    module = DraftModule(models.target, drafter, loss, models.rules, partial(adamw, lr=1e-3))
    with TemporaryDirectory() as folder:
        anchors = Path(folder) / "anchors"
        data.attach(models.tokenizer, anchors, drafter.num_proposals)
        refresh = RefreshAnchors(SpeculativeRollout(), anchors, show_progress=False)
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=epochs, gradient_clip_val=1.0, limit_val_batches=0,
            callbacks=[refresh, Accepted()], default_root_dir=folder, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        if epochs:
            trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
    return Run(list(module.held_out.tested.values()), accepted)


def draw_steps(panel: Axes, values: Mapping[str, Sequence[float]], per_epoch: int) -> None:
    """A dot per step, and a line at the mean of each epoch."""
    for number, (name, steps) in enumerate(values.items()):
        colour = COLOURS[number]
        panel.plot(range(1, len(steps) + 1), steps, ".", ms=5, alpha=0.5, color=colour)
        for begin in range(0, len(steps), per_epoch):
            mean = [float(np.mean(steps[begin : begin + per_epoch]))] * 2
            panel.plot([begin + 0.7, begin + per_epoch + 0.3], mean, lw=2.2, color=colour, label="" if begin else name)
    panel.set_xticks(range(0, len(steps) + 1, per_epoch))
    panel.legend(loc="lower right")
