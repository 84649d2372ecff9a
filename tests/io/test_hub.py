"""Model paths."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import huggingface_hub
import pytest

import draftopd
from draftopd.data.prompts import HubPrompts
from draftopd.errors import PromptError
from draftopd.evaluation.suites import Suite
from draftopd.io import hub
from draftopd.io.hub import limit_waiting, local_only, resolve, unavailable
from draftopd.rollout.recorded import DatasetTrajectories


@pytest.fixture
def knocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """A machine without proxy or network; says which addresses were tried."""
    tried: list[tuple[str, int]] = []

    def refuse(address: tuple[str, int], timeout: float) -> socket.socket:
        tried.append(address)
        raise TimeoutError

    monkeypatch.setattr(hub, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", refuse)
    hub._hub_reachable.cache_clear()
    yield tried
    hub._hub_reachable.cache_clear()


def test_bundled_paths_lie_in_the_package() -> None:
    assert Path(resolve("bundled:tiny_target")) == Path(draftopd.__file__).parent / "bundled" / "assets" / "tiny_target"
    assert resolve("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"


def test_a_directory_needs_no_network(knocks: list[tuple[str, int]], tmp_path: Path) -> None:
    assert local_only(str(tmp_path))
    assert not knocks


def test_an_unreachable_hub_is_tried_once(knocks: list[tuple[str, int]]) -> None:
    assert local_only("Qwen/Qwen3-4B") and local_only("Qwen/Qwen3-8B")
    assert knocks == [("hub.example", 443)]


def test_a_proxy_is_trusted(knocks: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert not local_only("Qwen/Qwen3-4B")
    assert not knocks


@pytest.fixture
def session() -> Iterator[httpx2.Client]:
    """The hub's client, as it was afterwards."""
    client = huggingface_hub.get_session()
    before = client.event_hooks
    yield client
    client.event_hooks = before


def test_requests_to_the_hub_end(monkeypatch: pytest.MonkeyPatch, session: httpx2.Client) -> None:
    """A hub that takes connections and never answers, asked in a way that sets no time-out."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HUB_TIMEOUT", 0.2)
    limit_waiting()
    limit_waiting()
    assert session.event_hooks["request"].count(hub._limit) == 1
    with socket.create_server(("127.0.0.1", 0)) as mute:
        api = huggingface_hub.HfApi(f"http://127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(httpx2.TimeoutException):
            api.dataset_info("a/b")


def test_whoever_asks_the_hub_limits_the_waiting(
    knocks: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, session: httpx2.Client
) -> None:
    import datasets

    asks: list[Callable[[], object]] = [
        lambda: local_only("Qwen/Qwen3-4B"),
        lambda: HubPrompts([{"path": "a/b", "field": "x"}]),
        lambda: Suite("own", "a/b", template="{x}").examples(),
        lambda: DatasetTrajectories("a/b"),
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    for ask in asks:
        session.event_hooks = {"request": [], "response": []}
        with suppress(PromptError):
            ask()
        assert session.event_hooks["request"] == [hub._limit]


MEND = "Copy or download it again, or name another."


def test_messages(tmp_path: Path) -> None:
    assert (
        unavailable(str(tmp_path), OSError("\n  no weights\nmore"))
        == f"The target {tmp_path} could not be loaded: no weights. " + MEND
    )
    assert (
        unavailable("a/b", RuntimeError("out of memory"))
        == "The target a/b could not be loaded: out of memory. " + MEND
    )
    assert "KeyError" in unavailable(str(tmp_path), KeyError())
    missing = unavailable("a/b", OSError("no route"))
    assert "a/b" in missing and "target.path=DIR" in missing
