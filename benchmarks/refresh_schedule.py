"""Train with anchors refreshed each epoch by decoding, and with anchors found in every step without decoding.

    python benchmarks/refresh_schedule.py
    python benchmarks/refresh_schedule.py --seeds 0 --plot-only

All runs start from the bundled drafter and see the same pool of prompts, as in the paper, where every epoch rolls
out the same prompts again. `equal steps` takes as many steps as the speculative arm; `equal time` as many as
fit in its time. Runs end with a held-out validation each epoch, whose time does not count. Results go to
benchmarks/results/refresh_schedule.json, the figure to docs/figures/refresh_schedule.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from machine import arguments, describe
from runs import RESULTS, ROOT, scalars, side_by_side, train

FRESH = ("rollout=decode_free", "refresh.every_n_steps=1")
ARMS: dict[str, tuple[str, ...]] = {
    "speculative rollout each epoch": ("rollout=speculative",),
    "decode-free every step, equal steps": FRESH,
    "decode-free every step, equal time": (*FRESH, "trainer.max_epochs=7"),
}


def main() -> None:
    options = parse()
    results = RESULTS / "refresh_schedule.json"
    if not options.plot_only:
        jobs = [(arm, seed) for seed in options.seeds for arm in ARMS]
        runs = side_by_side(lambda job: run(*job, options), jobs, options.parallel)
        results.write_text(
            json.dumps(
                {**describe(), "options": arguments(options), "runs": runs},
                indent=2,
            )
            + "\n"
        )
    runs = json.loads(results.read_text())["runs"]
    for arm in ARMS:
        final = [run["points"][-1] for run in runs if run["arm"] == arm]
        taus, seconds = [p["tau"] for p in final], [p["seconds"] for p in final]
        print(
            f"{arm}: tau {statistics.mean(taus):.3f} ({', '.join(f'{t:.3f}' for t in taus)}) "
            f"after {final[0]['step']} steps, {statistics.mean(seconds):.0f} s"
        )
    plot(runs, ROOT / "docs" / "figures" / "refresh_schedule.png")


def run(arm: str, seed: int, options: argparse.Namespace) -> dict:
    """One run; its validations as points."""
    overrides = [
        *ARMS[arm], f"seed={seed}", f"data.train_prompts.count={options.prompts}",
        f"data.prompts_per_refresh={options.prompts}",
    ]  # fmt: skip
    directory = train(overrides, options.runs / f"{list(ARMS).index(arm)}-{seed}", options.threads)
    return {"arm": arm, "seed": seed, "points": points(directory)}


def points(directory: Path) -> list[dict[str, float]]:
    """Step, training seconds and held-out tau of every validation."""
    seconds = dict(scalars(directory, "time/training_seconds"))
    # Lightning logs a validation at the last step before it, counted from 0; the one before training is at 0 too.
    return [
        {"step": step + (step > 0), "seconds": seconds.get(step, 0.0), "tau": tau}
        for step, tau in sorted(scalars(directory, "val/tau"))
    ]


def plot(runs: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for arm, color in zip(ARMS, ("tab:gray", "tab:blue", "tab:green"), strict=True):
        chosen = [run["points"] for run in runs if run["arm"] == arm]
        for axis, key in zip(axes, ("step", "seconds"), strict=True):
            for number, line in enumerate(chosen):
                axis.plot(
                    [p[key] for p in line], [p["tau"] for p in line], color=color, alpha=0.8, marker="o", markersize=3,
                    label=arm if number == 0 else None,
                )  # fmt: skip
    axes[0].set(xlabel="optimizer steps", ylabel="held-out tau")
    axes[1].set(xlabel="seconds of rollouts and steps")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"figure: {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=256, help="the pool")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of one run")
    parser.add_argument("--parallel", type=int, default=2, help="runs at once; give each its own cores")
    parser.add_argument("--runs", type=Path, default=Path("runs/refresh_schedule"))
    parser.add_argument("--plot-only", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
