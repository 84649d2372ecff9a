"""What the documentation says is there: keys described, modules listed, commands that compose, code that runs."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from draftopd.cli.check import check
from draftopd.cli.training import check_rollout
from draftopd.decoding.generate import Decoder
from draftopd.decoding.rules import Rules
from draftopd.drafters.checkpoint import save_drafter
from draftopd.losses.distilled import Distilled
from draftopd.targets.target import Target
from tests.support.blocks import make_blocks
from tests.support.models import small_model
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


@pytest.fixture(scope="module")
def reference() -> Any:
    sys.path.insert(0, str(DOCS / "hooks"))
    try:
        import configuration
    finally:
        sys.path.pop(0)
    return configuration


def test_every_key_is_described(reference: Any) -> None:
    meanings = reference.describe(reference.read(ROOT / "configs"))
    assert {key.partition(".")[0] for _, name, key in meanings if name == "train"} >= set(
        OmegaConf.load(ROOT / "configs" / "train.yaml")
    ) - {"defaults", "hydra"}
    assert not [place for place, text in meanings.items() if not text and not place[2].endswith("_target_")]


def test_the_reference_has_every_file_and_key(reference: Any) -> None:
    pages = "\n".join(reference.pages(ROOT / "configs").values())
    for path in (ROOT / "configs").glob("*/*.yaml"):
        assert f"## `{path.parent.name}={path.stem}`" in pages
    assert "| `loss.gamma` | <code>0.8</code> | slot k of the rejected stream weighs gamma^(k-1) |" in pages
    assert "## `loss=base/" not in pages and pages.count("| `loss.normalization` | <code>token</code> |") == 12
    assert "| `optimizer.betas` | <code>[0.9, 0.95]</code> |" in pages
    assert "| `target.path` | <code>???</code> |" in pages


def test_comments_are_read_off_the_file(reference: Any, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "# @package benchmark.x\n# What it is.\n#\n# More.\n_target_: a.B\n\n# Above,\n# in two lines.\none: 1\n"
        "two:\n  three: '#no'  # behind: # it\n  four: [1, {a: b}]\nfive: null\n"
    )
    option = reference.read_option(tmp_path / "x.yaml", "benchmark")
    assert (option.text, option.calls) == ("What it is.\n\nMore.", "a.B")
    assert [(k.override, k.default, k.comment) for k in option.keys] == [
        ("benchmark.x.one", "1", "Above, in two lines."),
        ("benchmark.x.two.three", "#no", "behind: # it"),
        ("benchmark.x.two.four", "[1, {a: b}]", ""),
        ("benchmark.x.five", "null", ""),
    ]


def test_the_api_lists_every_module() -> None:
    source = ROOT / "src"
    modules = [".".join(path.relative_to(source).with_suffix("").parts) for path in source.rglob("*.py")]
    public = [m for m in modules if not m.endswith(("__init__", "__main__")) and ".cli." not in m]
    listed = re.findall(r"^::: (\S+)$", "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md")), re.M)
    assert sorted(name for name in listed if ".cli." not in name) == sorted(public)


def commands(kind: str) -> list[str]:
    """The commands of all pages' shell blocks, lines that go on joined."""
    blocks = [b for page in PAGES for b in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return sorted({re.sub(r"\s+", " ", line[line.index(kind) :]).strip() for line in lines if kind in line})


GROUPS = {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()}
#: Parts that are only on the page.
INVENTED = ("loss=hellinger", "drafter=slot_heads", "benchmark=sums")


@pytest.mark.parametrize(
    "script, name", [("train.py", "train"), ("eval.py", "eval"), ("python -m draftopd plan", "train")]
)
def test_commands_compose(script: str, name: str) -> None:
    """Every group, option, key and type of every command is one that the scripts take."""
    # To compose takes half a second, so commands with the same choices are composed as one.
    together: dict[tuple[str, ...], dict[str, str]] = {}
    for command in commands(script):
        words = shlex.split(command.removeprefix(script), comments=True)
        overrides = [w for w in words if "=" in w and not w.startswith("plan.") and w not in INVENTED]
        if "-m" in words:  # a sweep, by its first run
            overrides = [re.sub(r"=([^,]*),.*", r"=\1", o) for o in overrides]
        choices = tuple(sorted(o for o in overrides if o.split("=")[0] in GROUPS))
        together.setdefault(choices, {}).update({o: command for o in overrides})
    assert together
    for overrides in together.values():
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            config = compose(name, list(overrides))
        check(known(config))


def known(config: DictConfig) -> Any:
    """As in a run, where its directory is known."""
    text = OmegaConf.to_yaml(config).replace("${hydra:runtime.output_dir}", "x")
    return OmegaConf.to_container(OmegaConf.create(text), resolve=True)


ABLATIONS = [p for p in (ROOT / "configs/experiment/ablation").glob("*.yaml") if p.stem != "base"]


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_every_job_of_an_ablation_composes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each choice and the ends of each range, beside the others' first values."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        whole = compose("train", [f"experiment=ablation/{path.stem}"], return_hydra_config=True).hydra
        assert whole.mode.name == "MULTIRUN" and whole.sweep.dir == f"runs/ablation/{path.stem}"
        params = {key: str(value).split(",") for key, value in (whole.sweeper.params or {}).items()}
        first = {key: values[0] for key, values in params.items()}
        for key, values in params.items():
            for value in values if key in GROUPS else dict.fromkeys((values[0], values[-1])):
                if key == "seed":
                    continue
                overrides = [f"{k}={v}" for k, v in {**first, key: value}.items()]
                config = compose("train", [f"experiment=ablation/{path.stem}", *overrides], return_hydra_config=True)
                monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": config.hydra}))
                del config.hydra
                check(known(config))
                config = OmegaConf.create(known(config))
                check_rollout(config, instantiate(config.rollout))


def test_links_of_files_outside_the_site() -> None:
    """MkDocs looks after its own pages' links."""
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        links = re.findall(r"\]\((?!http)([^)#\s]+)", (ROOT / name).read_text())
        assert all((ROOT / link).exists() for link in links), links


def code(page: str, first_line: str) -> dict[str, Any]:
    """What a page's Python block that begins so defines."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)
    (block,) = [b for b in blocks if b.startswith(first_line)]
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, page, "exec"), names)
    return names


def test_the_loss_of_the_page() -> None:
    hellinger = code("extending.md", "# src/draftopd/losses/hellinger.py")["hellinger"]
    drafted, targets = torch.randn(2, 5, 7, dtype=torch.float64)
    p, q = targets.softmax(-1), drafted.softmax(-1)
    expected = 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1)
    torch.testing.assert_close(hellinger(drafted, targets.log_softmax(-1)), expected)
    blocks = make_blocks()
    value = Distilled(accepted=hellinger, gamma=0.8)(blocks).loss
    assert 0 < value < 1 and torch.autograd.grad(value, blocks.draft_states)[0].abs().sum() > 0
    assert (ROOT / "README.md").read_text().count("def hellinger(draft_logits, log_p):") == 1


def test_the_drafter_of_the_page(tmp_path: Path) -> None:
    """It decodes losslessly, drafts the same in both settings, learns, and is read as it was written."""
    kind = code("extending.md", "# src/draftopd/drafters/slot_heads.py")["SlotHeads"]
    torch.manual_seed(0)
    target = Target(small_model("qwen3"))
    drafter = kind.build(target, None, block_size=4)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    plain, drafted = (Decoder(target, d, Rules(max_new_tokens=16)).decode_batch(prompts) for d in (None, drafter))
    assert [d.response for d in drafted] == [d.response for d in plain]

    target.tap(drafter.target_layer_ids)
    row = drafted[0]
    ids = torch.tensor([row.tokens])
    features = target.read(ids, target.new_cache(ids.shape[1])).features
    draft = drafter.replay(
        target, features, ids, torch.tensor([row.anchors]), lambda h: target.head.logits(h).argmax(-1)
    )
    assert draft.tokens[0].tolist() == row.proposals
    draft.hidden.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in drafter.parameters())

    save_drafter(drafter, tmp_path, torch.float32)
    again = kind.build(target, None, checkpoint=str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(drafter.parameters(), again.parameters(), strict=True))


def test_the_benchmark_of_the_page() -> None:
    suite = code("extending.md", "# src/draftopd/evaluation/sums.py")["Sums"](count=5)
    assert [e.id for e in suite.examples(2)] == [e.id for e in suite.examples()][:2]
    first = suite.examples()[0]
    assert first.messages[0]["content"] == "What is 12 plus 7?" and first.answer == 19


def test_the_decoder_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    names = code("api/index.md", "from draftopd.bundled.problems import problem")
    assert names["decoded"].acceptance_length > 1.5 and "tau" in capsys.readouterr().out


def test_yaml_of_the_page() -> None:
    for block in re.findall(r"^```yaml\n(.*?)^```", (DOCS / "extending.md").read_text(), re.M | re.S):
        assert re.match(r"# configs/\w+/\w+\.yaml\n", block) and isinstance(yaml.safe_load(block), dict)


def test_the_algorithm_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Draft-OPD on one page: every epoch prints tau, which rises."""
    names = code("algorithm.md", "import torch")
    taus = names["taus"]
    assert capsys.readouterr().out.count("tau") == len(taus) == names["EPOCHS"] + 1
    assert taus[-1] > 1.03 * taus[0] and not any(p.requires_grad for p in names["target"].parameters())
