"""Texts are the target's own, and each is produced once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.models import MakeRequest

from draftopd.decoding.generate import Decoder
from draftopd.decoding.rules import Rules
from draftopd.decoding.sampling import Sampling
from draftopd.errors import FileError
from draftopd.rollout.request import Request, Trajectory
from draftopd.rollout.store import TrajectoryStore
from draftopd.rollout.trajectories import GeneratedTrajectories, InProcessTrajectories


class Counting(GeneratedTrajectories):
    """Repeats each prompt backwards, remembers what it was asked for, and fails after ``good`` texts."""

    def __init__(self, store: Path, good: int = 1000) -> None:
        super().__init__(str(store))
        self.asked: list[list[int]] = []
        self.good = good

    def generate(self, request: Request, prompts: list[list[int]]) -> Iterator[list[Trajectory]]:
        for prompt in reversed(prompts):  # any order will do
            if len(self.asked) >= self.good:
                raise ConnectionError
            self.asked.append(prompt)
            yield [Trajectory(prompt, prompt[::-1])]


def flat(source: GeneratedTrajectories, request: Request) -> list[Trajectory]:
    return [text for batch in source.collect(request) for text in batch]


@pytest.mark.parametrize("drafted", [True, False])
def test_in_process_texts_are_the_targets(drafted: bool, tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request()
    found = flat(InProcessTrajectories(str(tmp_path), batch_size=5, drafted=drafted), request)
    plain = Decoder(request.target, None, Rules(stop=request.rules.stop, max_new_tokens=20)).decode_batch(
        request.prompts()
    )
    assert found == [Trajectory(d.prompt, d.response) for d in plain]
    assert {d.finish for d in plain} == {"stop", "length"}


def test_texts_come_in_the_order_of_the_prompts_and_once(tmp_path: Path, make_request: MakeRequest) -> None:
    prompts = [[1, 2], [3, 4, 5], [1, 2], [6]]
    source = Counting(tmp_path)
    assert flat(source, make_request(prompts)) == [Trajectory(p, p[::-1]) for p in prompts]
    assert sorted(source.asked) == [[1, 2], [3, 4, 5], [6]]
    assert (source.counts["generated"], source.counts["reused"]) == (3, 1)
    again = Counting(tmp_path)
    assert flat(again, make_request([[6], [7], [3, 4, 5]])) == [Trajectory(p, p[::-1]) for p in ([6], [7], [3, 4, 5])]
    assert again.asked == [[7]]
    assert (again.counts["generated"], again.counts["reused"]) == (1, 2)


def test_an_interrupted_collection_goes_on(tmp_path: Path, make_request: MakeRequest) -> None:
    prompts = [[i] for i in range(1, 9)]
    broken = Counting(tmp_path, good=5)
    with pytest.raises(ConnectionError):
        flat(broken, make_request(prompts))
    rest = Counting(tmp_path)
    assert flat(rest, make_request(prompts)) == [Trajectory(p, p) for p in prompts]
    assert len(rest.asked) == 3 and not any(p in broken.asked for p in rest.asked)


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 7},
        {"sampling": Sampling(1.0)},
        {"sampling": Sampling(1.0, top_k=3)},
        {"stop": frozenset({3})},
    ],
)
def test_other_settings_are_other_texts(change: dict, tmp_path: Path, make_request: MakeRequest) -> None:
    flat(Counting(tmp_path), make_request([[1, 2]]))
    other = Counting(tmp_path)
    flat(other, make_request([[1, 2]], **change))
    assert other.asked == [[1, 2]]
    assert len(list(tmp_path.iterdir())) == 2


def test_another_target_is_told_apart(tmp_path: Path, make_request: MakeRequest, small_vocabulary_target) -> None:
    request = make_request()
    assert request.target.fingerprint() != small_vocabulary_target.fingerprint()
    before = request.target.fingerprint()
    request.target.body.norm.weight.data[0] += 1
    assert request.target.fingerprint() != before
    before = request.target.fingerprint()
    request.target.body.layers[1].mlp.down_proj.weight.data.zero_()
    assert request.target.fingerprint() != before


def _opens(store: str, times: int) -> None:
    for i in range(times):
        with TrajectoryStore(Path(store), {"n": i}) as opened:
            opened.add([os.getpid(), i], [1, 2])


def test_processes_share_a_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_opens, args=(str(tmp_path), 20)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert all(len(TrajectoryStore(tmp_path, {"n": i})) == 3 for i in range(20))


@pytest.mark.parametrize("damage", ["flip", "truncate", "foreign"])
def test_a_damaged_shard_is_produced_again(
    damage: str, tmp_path: Path, make_request: MakeRequest, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [[1, 2], [3, 4, 5]]
    flat(Counting(tmp_path), make_request(prompts))
    (shard,) = tmp_path.glob("*/texts-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes({"flip": content, "truncate": content[:-9], "foreign": b"not a shard"}[damage])
    source = Counting(tmp_path)
    assert flat(source, make_request(prompts)) == [Trajectory(p, p[::-1]) for p in prompts]
    assert len(source.asked) == 2 and shard.name in caplog.text and "produced again" in caplog.text


def test_full_disk(tmp_path: Path, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    flat(Counting(tmp_path), make_request([[1, 2]]))

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FileError, match="texts-.*cannot be written.*No space left"):
        flat(Counting(tmp_path), make_request([[1, 2], [3]]))
    monkeypatch.undo()
    after = Counting(tmp_path)
    flat(after, make_request([[1, 2]]))
    assert after.asked == []


def test_progress_counts_texts_and_tokens(tmp_path: Path, make_request: MakeRequest) -> None:
    told: list[tuple[int, int]] = []
    request = make_request([[1, 2], [3, 4, 5]], progress=lambda texts, tokens: told.append((texts, tokens)))
    flat(Counting(tmp_path), request)
    assert sorted(told) == [(0, 0), (1, 2), (1, 3)]
    told.clear()
    flat(Counting(tmp_path), request)
    assert told == [(2, 0)]
