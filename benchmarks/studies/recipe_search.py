"""How the recipe was found: one change at a time, with one seed, judged by tau on validation prompts.

    python -m benchmarks.studies.recipe_search
    python -m benchmarks.studies.recipe_search --only-draw   # the table from the results kept

Every row trains the bundled drafter for five epochs of 256 new prompts, with 512 replays each unless it says otherwise.
Then 256 prompts are validated. With one seed, small differences mean nothing. Runs that have ended are not run again.
Results go to benchmarks/results/recipe_search.json.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.common import RESULTS, keep, read
from benchmarks.studies.runs import markdown, side_by_side, study_parser, train
from draftopd.cli.runs import find

KEPT = RESULTS / "recipe_search.json"

COMMON = [
    "validate_first=false", "data.validation_count=256", "trainer.max_epochs=5", "trainer.check_val_every_n_epoch=5",
    "data.test_count=0", "module.count_flops=false", "seed=7",
]  # fmt: skip
SFT = ["experiment=plateau/sft"]
FRESH = ["rollout=fresh"]
SMALL = ["data.batch_size=4", "data.batches_per_epoch=128"]
TINY = ["data.batch_size=2", "data.batches_per_epoch=256"]
ALIKE = ["loss.accepted_gamma=1.0"]
LONGER, LONGEST = ["drafter.block_size=12"], ["drafter.block_size=16"]
#: From the recipe's loss to another, in a straight line.
TO = ["loss=blend", "loss@loss.first=sharp_kl", "loss.first.accepted_gamma=1.0"]
TO_REVERSE = ["loss@loss.second=reverse_kl", "loss.second.include_correction=true", "loss.second.normalization=stream"]

#: What is tried, by the name of its run.
ROWS = {
    "sft": SFT,
    "sft_b4": [*SFT, *SMALL],
    "sft_b4_lr3": [*SFT, *SMALL, "optimizer.lr=3e-4"],
    "sft_b4_lr30": [*SFT, *SMALL, "optimizer.lr=3e-3"],
    "sft_b4_k12": [*SFT, *SMALL, *LONGER],
    "sft_b4_k16": [*SFT, *SMALL, *LONGEST],
    "asym": FRESH,
    "aps_null": [*FRESH, "data.anchors_per_sequence=null"],
    "g1": [*FRESH, *ALIKE],
    "b8": [*FRESH, "data.batch_size=8", "data.batches_per_epoch=64"],
    "b4": [*FRESH, *SMALL],
    "b4_g1": [*FRESH, *SMALL, *ALIKE],
    "b4_g1_lr15": [*FRESH, *SMALL, *ALIKE, "optimizer.lr=1.5e-3"],
    "b4_g1_lr5": [*FRESH, *SMALL, *ALIKE, "optimizer.lr=5e-3"],
    "b4_g1_k12": [*FRESH, *SMALL, *ALIKE, *LONGER],
    "b4_g1_k16": [*FRESH, *SMALL, *ALIKE, *LONGEST],
    "b2_g1": [*FRESH, *TINY, *ALIKE],
    "b2_g1_lr15": [*FRESH, *TINY, *ALIKE, "optimizer.lr=1.5e-3"],
    "b4_g1_r1": [*FRESH, *ALIKE, "data.batch_size=4", "data.batches_per_epoch=90", "data.prompts_per_refresh=360"],
    "b4_g1_r4": [*FRESH, *ALIKE, "data.batch_size=4", "data.batches_per_epoch=160", "data.prompts_per_refresh=160"],
    "fk_a3": [
        *FRESH, "loss=forward_kl", "loss.target_temperature=0.05", "loss.accepted_weight=0.3",
        "loss.accept_until_fail=true", "loss.gamma=0.8",
    ],
    "dp0": [*FRESH, "loss=d_pace", "loss.smoothing=0.0"],
    "dp1": [*FRESH, "loss=d_pace", "loss.smoothing=0.1"],
    "dp5": [*FRESH, "loss=d_pace", "loss.smoothing=0.5"],
    "b4_reach": [*FRESH, *SMALL, "loss=reach"],
    "b4_gain": [*FRESH, *SMALL, "loss=reach", "loss.future=true"],
    "b4_e2e": [*FRESH, *SMALL, "loss=e2e_tv"],
    "b4_to_rkl": [*FRESH, *SMALL, *TO, *TO_REVERSE, "loss.second.rejected_weight=0.0"],
    "b4_to_rkl_sharp": [
        *FRESH, *SMALL, *TO, *TO_REVERSE, "loss.second.rejected_weight=0.0", "loss.second.target_temperature=0.05",
    ],
    "b4_curriculum": [
        *FRESH, *SMALL, *TO, "loss@loss.second=sharp_kl", "loss.first.accepted_gamma=0.5",
        "loss.second.accepted_gamma=1.0",
    ],
}  # fmt: skip


def main() -> None:
    options = parse()
    if not options.only_draw:
        texts = f"trajectories.store={options.runs.resolve() / 'texts'}"
        side_by_side(
            lambda name: train([*ROWS[name], *COMMON, texts], options.runs / name), options.rows, options.parallel
        )
        write(options)
    draw(read(KEPT)["rows"])


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__, "runs/recipe_search", seeds=())
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    return parser.parse_args()


def write(options: argparse.Namespace) -> None:
    """Keep the results of the rows asked for; all other rows stay as they are."""
    kept = {row["row"]: row for row in read(KEPT)["rows"]}
    for name in options.rows:
        report = find([options.runs / name])[0].report
        kept[name] = {
            "row": name, "overrides": ROWS[name], "steps": report["steps"], "tau": round(report["tau_after"], 4)
        }  # fmt: skip
    rows = [kept[name] for name in ROWS if name in kept]
    keep(KEPT, options, {"common": COMMON, "rows": rows})


def draw(rows: list[dict[str, Any]]) -> None:
    markdown(
        "`python train.py` ...|steps:|tau, validation:",
        [[f"`{' '.join(row['overrides'])}`", str(row["steps"]), f"{row['tau']:.3f}"] for row in rows],
    )


if __name__ == "__main__":
    main()
