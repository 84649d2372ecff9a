"""Memory of a run's phases, its time, and changes that make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from draftopd.planning import memory, work
from draftopd.planning.devices import Assumptions
from draftopd.planning.memory import Decoding, Parts, Phase, Sharing
from draftopd.planning.sizes import DrafterSize, Step, TargetSize


@dataclass(frozen=True)
class Texts:
    """Where a refresh's texts come from.

    Args:
        decoding: how this process decodes them; None: they are recorded, or a server decodes them.
        drafted: this process decodes them with the drafter.
        walk: how anchors are found on them without decoding; None: by decoding.
        blocks_at_once: see :class:`~draftopd.rollout.walk.Walker`.
        fresh: anchors are found in every training step instead of once per refresh.
        decoded_by: the configuration group with the decoding's ``batch_size``.
    """

    decoding: Decoding | None
    drafted: bool = True
    walk: Decoding | None = None
    blocks_at_once: int = 0
    fresh: bool = False
    decoded_by: str = "rollout"


@dataclass(frozen=True)
class Run:
    """Sizes of a run, per process.

    Args:
        step: the largest training step, for memory; ``mean``: the average one, for time.
        used, proposes, every: see :func:`draftopd.planning.work.training_step`.
        batches: training batches per epoch; ``prompts``, ``validation_prompts``: of all processes together.
        refreshes, validations: their number in the run.
        mean_prompt, mean_response: average tokens per text.
    """

    target: TargetSize
    drafter: DrafterSize
    step: Step
    mean: Step
    sharing: Sharing
    devices: int
    texts: Texts
    validation: Decoding
    used: float
    proposes: bool
    every: int
    epochs: int
    batches: int
    accumulate: int
    prompts: int
    refreshes: int
    validation_prompts: int
    validations: int
    mean_prompt: int
    mean_response: int
    compiled: bool = False

    def resident(self) -> Parts:
        """What is held during the whole run."""
        return memory.resident(self.target, self.drafter, self.sharing, self.step.weight_bytes)

    def phases(self) -> list[Phase]:
        """The training step, and those of rollout, walk and validation that the run has."""
        t, d = self.target, self.drafter
        phases = []
        if self.texts.decoding:
            phases.append(memory.decoding("rollout", t, d, self.texts.decoding))
        if self.texts.walk:
            phases.append(memory.walking(t, d, self.texts.walk, self.texts.blocks_at_once))
        if self.validations:
            phases.append(memory.decoding("validation", t, d, self.validation))
        # Outside the training step, the last step's gradients are still held.
        held = {"gradients": d.elements * self.step.weight_bytes}
        phases = [Phase(name, [m._replace(parts=held | m.parts) for m in moments]) for name, moments in phases]
        return [memory.training_step(t, d, self.step), *phases]

    def peak(self) -> float:
        """Bytes held at the run's largest moment."""
        return sum(self.resident().values()) + max(phase.peak.bytes for phase in self.phases())

    def step_work(self) -> dict[str, work.Work]:
        """The work of one training step, by part."""
        parts = work.training_step(
            self.target, self.drafter, self.mean, self.sharing, self.used, self.proposes, self.every
        )
        moved = 9 * self.drafter.elements * self.step.weight_bytes  # AdamW: reads 4, writes 3; clipping: 2
        parts["optimizer"] = work.Work(read=moved / self.accumulate)
        return parts

    def seconds(self, given: Assumptions) -> dict[str, float]:
        """Minimum seconds of each part of the run, in total."""
        t, d = self.target, self.drafter
        step = sum(part.seconds(given) for part in self.step_work().values())
        found = {"training steps": step * self.batches * self.epochs}
        texts = self.texts
        if texts.decoding:
            batches = -(-self.prompts // (self.devices * texts.decoding.rows))
            one = self._decoding(given, texts.decoding, texts.drafted)
            found["rollouts"] = one * batches * self.refreshes
        if texts.walk:
            rows, times = texts.walk.rows, self.refreshes * self.prompts / self.devices / texts.walk.rows
            if texts.fresh:
                rows, times = self.step.batch, self.batches * self.epochs
            walk = replace(self._mean(texts.walk), rows=rows)
            found["anchors"] = work.walking(t, d, walk, given.tau, not texts.fresh, self.sharing).seconds(given) * times
        if self.validations:
            batches = -(-self.validation_prompts // (self.devices * self.validation.rows))
            found["validations"] = self._decoding(given, self.validation, True) * batches * self.validations
        return found

    def _mean(self, run: Decoding) -> Decoding:
        return replace(run, prompt=self.mean_prompt, response=self.mean_response)

    def _decoding(self, given: Assumptions, run: Decoding, drafted: bool) -> float:
        drafter = self.drafter if drafted else None
        prompts, steps = work.decoding(self.target, drafter, self._mean(run), self.sharing, given.tau)
        return prompts.seconds(given) + steps.seconds(given, self.compiled)

    def to_fit(self, limit: float) -> Iterator[tuple[str, Run]]:
        """Changes, each on top of those before, until the run fits or no change makes it smaller."""
        run = self
        while run.peak() > limit:
            phase = max(run.phases(), key=lambda phase: phase.peak.bytes).name
            change = next((c for c in run._changes(phase) if c[1].peak() < run.peak()), None)
            if change is None:
                return
            run = change[1]
            yield change

    def _changes(self, phase: str) -> Iterator[tuple[str, Run]]:
        """Changes that make a phase smaller, in order of their cost in time or quality."""
        step, texts = self.step, self.texts
        if phase == "training step" and not step.checkpointing:
            yield "drafter.activation_checkpointing=true", self._stepped(lambda s: replace(s, checkpointing=True))
        if phase == "rollout" and texts.decoding and texts.decoding.rows > 1:
            rows = texts.decoding.rows // 2
            yield (
                f"{texts.decoded_by}.batch_size={rows}",
                replace(self, texts=replace(texts, decoding=replace(texts.decoding, rows=rows))),
            )
        if phase == "walk" and texts.walk and texts.walk.rows > 1:
            rows, blocks = texts.walk.rows // 2, max(1, texts.blocks_at_once // 2)
            batch = "data.batch_size" if texts.fresh else "rollout.batch_size"
            yield (
                f"{batch}={rows} rollout.blocks_at_once={blocks}",
                replace(self, texts=replace(texts, walk=replace(texts.walk, rows=rows), blocks_at_once=blocks)),
            )
        if phase == "validation" and self.validation.rows > 1:
            rows = self.validation.rows // 2
            yield f"data.validation_batch_size={rows}", replace(self, validation=replace(self.validation, rows=rows))
        if phase == "training step" and step.batch > 1:
            half = step.batch // 2
            yield (
                f"data.batch_size={half}",
                replace(self._stepped(lambda s: replace(s, batch=half)), batches=self.batches * step.batch // half),
            )
        if phase == "training step" and step.anchors > 64:
            few = step.anchors // 2
            yield f"data.anchors_per_sequence={few}", self._stepped(lambda s: replace(s, anchors=min(s.anchors, few)))
        if self.sharing.shards == 1:
            devices = max(2, self.devices)
            yield f"trainer=fsdp trainer.devices={devices}", self._sharded(devices)
        elif self.devices < 64:
            yield f"trainer.devices={2 * self.devices}", self._sharded(2 * self.devices)

    def _stepped(self, change: Callable[[Step], Step]) -> Run:
        return replace(self, step=change(self.step), mean=change(self.mean))

    def _sharded(self, devices: int) -> Run:
        batches = max(1, self.batches * self.devices // devices)
        return replace(self, devices=devices, batches=batches, sharing=Sharing(shards=devices))
