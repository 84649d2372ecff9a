"""All commands: ``python -m draftopd VERB``, or ``draftopd VERB`` where the package is installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from draftopd.cli import app
from draftopd.cli.nearest import nearest
from draftopd.errors import DraftOPDError

Verb = Callable[[argparse.Namespace], None]

PLAN = """\
Print memory and time of a training run before it is started. No weights and no GPU are needed.

    python -m draftopd plan target=qwen3_30b_a3b trainer.devices=8
    python -m draftopd plan experiment=paper target=qwen3_8b plan.gpu=A100 drafter.activation_checkpointing=true

Takes the overrides of train.py, and plan.NAME=VALUE for its assumptions, which docs/planning.md lists.
"""
COLLECT = """\
Print training runs that have ended as one CSV table: one row per run, with the settings that differ and the results.

    python -m draftopd collect runs/ablation > ablation.csv
"""
EXPORT = """\
Write a drafter of any kind in the format of a serving engine.

    python -m draftopd export runs/opd/.../checkpoints/last.ckpt OUT
    python -m draftopd export runs/opd/.../drafter OUT --format speculators --target Qwen/Qwen3-8B

`public` is the format in which each kind of drafter is published, loaded beside the target: DFlash as z-lab does (vLLM
`method: dflash`, SGLang `DFLASH`, transformers), EAGLE-3 as SafeAILab and SpecForge do (vLLM `method: eagle3`, SGLang
`EAGLE3`). `speculators` is vLLM's own, which names the target: `vllm serve OUT`. MTP heads have only this format. A
training checkpoint can be exported during training.
"""
IMPORT = """\
Write a drafter in the speculators format in its public one, from which training starts.

    python -m draftopd import SPECULATORS_DIR OUT --target Qwen/Qwen3-8B
"""
BUFFER = """\
Print the figures of an anchor buffer and its first three sequences.

    python -m draftopd buffer runs/opd/.../anchors
"""
PAPER = """\
Print the Draft-OPD paper's figures beside those of your own evaluation.

    python -m draftopd paper runs/eval/.../results.json

The paper's are means over its suite (thinking, temperature 0; arXiv 2605.29343); the run's are means over its own
benchmarks. A run's drafter is put in the paper's row of its target and name: `eagle3`, `dflash` or `opd` in the name
given by `checkpoint={dflash: DIR, opd: DIR}`.
"""
PRETRAIN = """\
Rebuild the bundled target, or make a small one of another family: pretrain, measure, and write the model card.

    python -m draftopd pretrain --out DIR

An interrupted run continues from DIR/training.pt with the same command.
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the verb that the arguments start with, by default those of the process.

    Raises:
        SystemExit: with a message if the user can mend the error, and at the end of ``train`` and ``eval``.
    """
    given = sys.argv[1:] if arguments is None else arguments
    parser, verbs = _parser()
    if given and not given[0].startswith("-") and given[0] not in verbs:
        sys.exit(f"Error: {given[0]} is not a verb of draftopd: {nearest(given[0], verbs)}")
    if given and given[0] in ("train", "eval"):
        app.run(given[0], given[1:])
    options = parser.parse_args(given or ["--help"])
    try:
        options.run(options)
    except DraftOPDError as error:
        sys.exit(f"Error: {error}")


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of all verbs, and their names."""
    parser = argparse.ArgumentParser(prog="python -m draftopd", description="On-policy distillation of draft models.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def add(name: str, line: str, run: Verb | None = None, text: str = "") -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name, help=line, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )  # fmt: skip
        made.set_defaults(run=run)
        return made

    add("train", "train a drafter; the same as python train.py")
    add("eval", "evaluate drafters, in process or on a server; the same as python eval.py")
    plan = add("plan", "print memory and time of a training run before it is started", _plan, PLAN)
    plan.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of train.py, and plan.NAME=VALUE")
    collect = add("collect", "print training runs as one table", _collect, COLLECT)
    collect.add_argument("directories", nargs="+", type=Path, help="sweeps or single runs, searched below")

    out = add("export", "write a drafter in the format of a serving engine", _export, EXPORT)
    out.add_argument("source", help="drafter directory, run directory or .ckpt of a training run")
    out.add_argument("--format", choices=("public", "speculators"), default="public")
    out.add_argument("--target", help="the target's directory or hub name (for speculators)")
    out.add_argument("--verifier", help="how the server finds the target; default: --target")
    into = add("import", "write a drafter of the speculators format in its public one", _import, IMPORT)
    into.add_argument("source", help="directory in the speculators format")
    into.add_argument("--target", required=True, help="the target's directory or hub name")
    for command in (out, into):
        command.add_argument("output", help="directory to write")
        command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")

    buffer = add("buffer", "print the figures of an anchor buffer", _buffer, BUFFER)
    buffer.add_argument("directory", type=Path, help="anchors/ of a run, or one generation of it")
    paper = add("paper", "print the paper's figures beside an evaluation", _paper, PAPER)
    paper.add_argument(
        "results", type=Path, nargs="?", help="results.json of an evaluation; without it the paper alone"
    )
    pretrain = add("pretrain", "rebuild the bundled target, or one of another family", _pretrain, PRETRAIN)
    pretrain.add_argument("--out", type=Path, required=True, help="directory for the model, and for resuming")
    for name, kind, line in (
        ("--steps", int, "optimizer steps (1600)"),
        ("--batch", int, "problems per step (48)"),
        ("--rate", float, "peak learning rate (0.003)"),
    ):
        pretrain.add_argument(name, type=kind, default=argparse.SUPPRESS, help=line)
    families = ("qwen3", "llama")
    pretrain.add_argument("--family", choices=families, default=argparse.SUPPRESS, help="family of its layers (qwen3)")
    return parser, list(verbs.choices)


def _plan(options: argparse.Namespace) -> None:
    from draftopd.cli.planning import plan

    plan(options.overrides)


def _collect(options: argparse.Namespace) -> None:
    from draftopd.cli.runs import find, rows, write_csv

    write_csv(rows(find(options.directories)), sys.stdout)


def _export(options: argparse.Namespace) -> None:
    from draftopd.cli.interop import export

    _convert(options, export)


def _import(options: argparse.Namespace) -> None:
    from draftopd.cli.interop import bring_in

    _convert(options, bring_in)


def _convert(options: argparse.Namespace, convert: Callable[..., str]) -> None:
    given = {name: value for name, value in vars(options).items() if name != "run"}
    try:
        advice = convert(**given)
    except OSError as error:
        sys.exit(f"Error: {options.output} cannot be written: {error}. Name a directory that can.")
    print(f"wrote {options.output}\n{advice}")


def _buffer(options: argparse.Namespace) -> None:
    from draftopd.rollout.buffer import describe

    print(describe(options.directory))


def _paper(options: argparse.Namespace) -> None:
    from draftopd.evaluation.paper import read, table

    print(table([] if options.results is None else read(options.results)))


def _pretrain(options: argparse.Namespace) -> None:
    from draftopd.bundled.pretrain import pretrain

    pretrain(**{name: value for name, value in vars(options).items() if name != "run"})


if __name__ == "__main__":
    main()
