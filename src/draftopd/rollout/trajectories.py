"""Trajectories: the target's own texts, from any source.

The target's texts do not depend on the drafter, so each is produced only once: by decoding in this process, by a
serving engine (:mod:`draftopd.rollout.server`) or by an earlier recording (:mod:`draftopd.rollout.recorded`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pydantic import PositiveInt

from draftopd.decoding.generate import Decoder
from draftopd.distributed import ranks
from draftopd.errors import PromptError
from draftopd.rollout.origin import excess_surprise, foreign_tokens
from draftopd.rollout.request import Request, Trajectory
from draftopd.rollout.store import TrajectoryStore

#: Number of texts whose origin is checked.
ORIGIN_SAMPLE = 16
#: Maximum fraction of their tokens that may differ from the target's; low precision may decide near ties differently.
MAX_FOREIGN = 0.05
#: Maximum mean excess surprise of tokens drawn above temperature 0, in nats.
MAX_SURPRISE = 0.5


class Trajectories(ABC):
    """A source of texts.

    Attributes:
        counts: how many texts of the last :meth:`collect` were used or left out, by reason, for the log.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._checked = False
        self._sample: list[Trajectory] = []

    @abstractmethod
    def collect(self, request: Request) -> Iterator[list[Trajectory]]:
        """The request's texts, in batches."""

    def check_origin(self, request: Request, texts: list[Trajectory], last: bool = False) -> bool:
        """Check, once per source, whether its first texts are the target's own.

        Args:
            texts: further texts; the check runs as soon as there are :data:`ORIGIN_SAMPLE`.
            last: there will be no further texts.

        Returns:
            Whether the check has passed; False while texts are missing.

        Raises:
            PromptError: if the target would not have produced the texts.
        """
        if self._checked:
            return True
        self._sample += texts[: ORIGIN_SAMPLE - len(self._sample)]
        if not self._sample or (len(self._sample) < ORIGIN_SAMPLE and not last):
            return False
        sample, self._sample, self._checked = self._sample, [], True
        sampling = request.rules.sampling
        foreign = sum(map(len, foreign_tokens(request.target, sample, sampling)))
        tokens = sum(len(t.response) for t in sample)
        self.counts["foreign tokens"] = foreign
        surprise = excess_surprise(request.target, sample, sampling)
        if foreign > MAX_FOREIGN * tokens or surprise > MAX_SURPRISE:
            average = "" if sampling.greedy else f", {surprise:.2f} nats per token more surprising"
            raise PromptError(
                f"{foreign} of the first {tokens} recorded response tokens are not what the target would produce at "
                f"temperature {sampling.temperature:g}{average}: use texts of this target, drawn with the same "
                "temperature, top_k and top_p."
            )
        return True


class GeneratedTrajectories(Trajectories):
    """Texts produced for prompts; those in the store are not produced again.

    Args:
        store: directory of the texts, shared by all runs that name it.
    """

    def __init__(self, store: str) -> None:
        super().__init__()
        self.store = store

    def collect(self, request: Request) -> Iterator[list[Trajectory]]:
        """The request's texts in the order of its prompts, after all have been produced.

        Raises:
            FileError: if the store cannot be written.
        """
        self.counts = Counter()
        prompts = request.prompts()
        with TrajectoryStore(Path(self.store), settings(request)) as store:
            missing = [list(p) for p in dict.fromkeys(map(tuple, prompts)) if store.get(list(p)) is None]
            self.counts.update(reused=len(prompts) - len(missing), generated=0)
            request.progress(self.counts["reused"], 0)
            for batch in self.generate(request, missing) if missing else ():
                for trajectory in batch:
                    store.add(*trajectory)
                self.counts["generated"] += len(batch)
                request.progress(len(batch), sum(len(t.response) for t in batch))
            store.flush()
            for prompt in prompts:
                response = store.get(prompt)
                if response is not None:
                    yield [Trajectory(prompt, response)]

    @abstractmethod
    def generate(self, request: Request, prompts: list[list[int]]) -> Iterator[list[Trajectory]]:
        """Produce texts for these prompts, in any order; unverified texts are left out."""


class InProcessTrajectories(GeneratedTrajectories):
    """Texts decoded in this process.

    Args:
        batch_size: prompts decoded together.
        drafted: decode speculatively with the current drafter. This gives texts of the same distribution, and faster
            unless the drafter is untrained.
        store: see :class:`GeneratedTrajectories`.
        compiled: see :class:`~draftopd.decoding.generate.Decoder`.
    """

    def __init__(self, store: str, batch_size: PositiveInt = 64, drafted: bool = True, compiled: bool = False) -> None:
        super().__init__(store)
        self.batch_size, self.drafted, self.compiled = batch_size, drafted, compiled

    def generate(self, request: Request, prompts: list[list[int]]) -> Iterator[list[Trajectory]]:
        decoder = Decoder(request.target, request.drafter if self.drafted else None, request.rules, self.compiled)
        for batch in decoder.decode(prompts, self.batch_size, ranks.own(request.seed)):
            yield [Trajectory(d.prompt, d.response) for d in batch]


def settings(request: Request) -> dict[str, object]:
    """Everything that a text depends on, apart from its prompt and, above temperature 0, chance."""
    sampling = request.rules.sampling
    return {
        "target": request.target.fingerprint(),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "max_new_tokens": request.rules.max_new_tokens,
        "stop": sorted(request.rules.stop),
    }
