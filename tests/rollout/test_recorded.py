"""Recorded token ids: read as they are, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.models import MakeRequest

from draftopd.decoding.generate import Decoder
from draftopd.decoding.rules import Rules
from draftopd.errors import PromptError
from draftopd.rollout.recorded import DatasetTrajectories, JsonlTrajectories
from draftopd.rollout.request import Request, Trajectory
from draftopd.rollout.trajectories import Trajectories


def texts_of(request: Request) -> list[Trajectory]:
    decoder = Decoder(request.target, None, Rules(stop=request.rules.stop, max_new_tokens=20))
    return [Trajectory(d.prompt, d.response) for d in decoder.decode_batch(request.prompts())]


def write(path: Path, texts: list[Trajectory], **more: object) -> str:
    rows = [{"prompt_token_ids": t.prompt, "token_ids": t.response, **more} for t in texts]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return str(path)


def flat(source: Trajectories, request: Request) -> list[Trajectory]:
    return [text for batch in source.collect(request) for text in batch]


def test_every_text_once_a_round_in_another_order(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request()
    texts = texts_of(request)
    source = JsonlTrajectories(write(tmp_path / "texts.jsonl", texts, extra=1))
    assert len(source) == 12
    first, second = (flat(source, make_request(indices=range(i, i + 12))) for i in (0, 12))
    assert first != second and sorted(first) == sorted(second) == sorted(texts)
    assert flat(source, make_request(indices=range(3, 12, 4))) == first[3::4]
    assert flat(JsonlTrajectories(str(tmp_path / "texts.jsonl"), seed=1), request) != first


def test_responses_end_at_stop_token_and_limit(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request()
    text = next(t for t in texts_of(request) if t.response[-1] in request.rules.stop and len(t.response) > 3)
    path = write(tmp_path / "texts.jsonl", [Trajectory(text.prompt, [*text.response, 5, 6])])
    source = JsonlTrajectories(path)
    assert flat(source, make_request(indices=range(1))) == [text]
    assert flat(source, make_request(indices=range(1), max_new_tokens=2)) == [
        Trajectory(text.prompt, text.response[:2])
    ]


def test_long_prompts_are_counted(tmp_path: Path, make_request: MakeRequest) -> None:
    texts = texts_of(make_request())
    source = JsonlTrajectories(write(tmp_path / "texts.jsonl", texts))
    kept = flat(source, make_request(max_prompt_tokens=5))
    assert {len(t.prompt) for t in kept} == {4, 5}
    assert source.counts["prompt too long"] == 12 - len(kept) and source.counts["read"] == len(kept)
    with pytest.raises(PromptError, match="None of 12 recorded texts.*12 prompts are longer.*max_prompt_tokens=3"):
        flat(source, make_request(max_prompt_tokens=3))


def test_another_models_texts_are_refused(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request()
    foreign = [Trajectory(t.prompt, [(x + 7) % 60 for x in t.response]) for t in texts_of(request)]
    source = JsonlTrajectories(write(tmp_path / "texts.jsonl", foreign))
    with pytest.raises(PromptError, match="not what the target would produce at temperature 0: use texts of this"):
        flat(source, request)


def test_a_few_ties_decided_otherwise_are_counted(tmp_path: Path, make_request: MakeRequest) -> None:
    texts = texts_of(make_request())
    texts[0].response[-1] = (texts[0].response[-1] + 20) % 60
    source = JsonlTrajectories(write(tmp_path / "texts.jsonl", texts))
    assert len(flat(source, make_request())) == 12
    assert source.counts["foreign tokens"] == 1


def test_datasets(tmp_path: Path, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets package is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = texts_of(make_request())
    rows = {"asked": [t.prompt for t in texts], "token_ids": [t.response for t in texts]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "texts.parquet")
    source = DatasetTrajectories("parquet", data_files=str(tmp_path / "texts.parquet"), prompt_field="asked")
    assert sorted(flat(source, make_request())) == sorted(texts)
    with pytest.raises(PromptError, match="could not be loaded.*trajectories=jsonl"):
        DatasetTrajectories("parquet", data_files=str(tmp_path / "other.parquet"))
