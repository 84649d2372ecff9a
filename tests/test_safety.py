"""What the code never does with files and answers from elsewhere, read off its source; and the audit's exit status."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from draftopd.io.hub import _hub_reachable
from draftopd.planning.shapes import shape_of
from draftopd.targets.load import load_target, load_tokenizer

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "src").rglob("*.py")), ROOT / "train.py", ROOT / "eval.py"]

#: Calls that run what they read.
RUNS = {
    "eval", "exec", "compile", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load",
    "marshal.loads", "shelve.open", "yaml.load", "os.system", "os.popen", "runpy.run_path", "torch.hub.load",
    "numpy.load", "np.load", "shutil.unpack_archive",
}  # fmt: skip


@cache
def nodes() -> list[tuple[Path, ast.AST]]:
    return [(path, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]


@cache
def calls() -> list[tuple[str, str, dict[str, object]]]:
    """``(place, name, keyword arguments)`` of every call; arguments that are no constants are ``...``."""
    found = []
    for path, node in nodes():
        if isinstance(node, ast.Call):
            options = {
                k.arg or "**": k.value.value if isinstance(k.value, ast.Constant) else ... for k in node.keywords
            }
            found.append((f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), options))
    return found


def test_nothing_that_is_read_is_run() -> None:
    found = [(place, name) for place, name, options in calls() if name in RUNS or options.get("shell") is True]
    assert not found


def test_pickles_hold_tensors_and_plain_values_only() -> None:
    loads = [(place, options) for place, name, options in calls() if name == "torch.load"]
    resumes = [(place, options) for place, _, options in calls() if "ckpt_path" in options]
    assert loads and resumes
    assert all(options.get("weights_only") is True for _, options in loads + resumes), loads + resumes


def test_targets_are_read_from_safetensors_without_their_code() -> None:
    models = [o for _, name, o in calls() if name == "AutoModelForCausalLM.from_pretrained"]
    assert models and all(options.get("use_safetensors") is True for options in models)
    for load in (load_target, load_tokenizer, shape_of):
        assert inspect.signature(load).parameters["trust_remote_code"].default is False
    for path in sorted((ROOT / "configs" / "target").rglob("*.yaml")):
        choice = OmegaConf.select(OmegaConf.load(path), "target.trust_remote_code")
        assert choice is (False if path.parent.name == "base" else None), path
    assert not [place for place, _, options in calls() if options.get("trust_remote_code") is True]


def test_only_the_commands_know_hydra() -> None:
    """So that no checkpoint, buffer or answer can name a class to be made."""
    for path, node in nodes():
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.split(".")[0] == "hydra" for name in names):
            assert path.parent.name == "cli" or path.parent == ROOT, path
    made = {place.rpartition(":")[0] for place, name, _ in calls() if name.endswith("instantiate")}
    assert made == {f"src/draftopd/cli/{name}.py" for name in ("training", "evaluation", "planning")}


def test_whatever_opens_a_connection_gives_up() -> None:
    """Connections to servers and programs; those to the hub are tests/io/test_hub.py's."""
    opens = ("subprocess.run", "socket.create_connection", "httpx2.Client", "httpx2.get", "urlopen", "requests.get")
    found = [(place, name, options) for place, name, options in calls() if name in opens]
    assert {name for _, name, _ in found} == {"subprocess.run", "socket.create_connection", "httpx2.Client"}
    assert all("timeout" in options for _, name, options in found if name != "socket.create_connection"), found
    assert inspect.signature(_hub_reachable).parameters["timeout"].default == 5
    asking = {place.rpartition(":")[0] for place, name, _ in calls() if name.endswith("datasets.load_dataset")}
    limiting = {place.rpartition(":")[0] for place, name, _ in calls() if name == "limit_waiting"}
    assert asking and asking <= limiting


@pytest.mark.parametrize(
    ("packages", "status", "said"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], 0, "0 packages with known"),
        ([{"name": "a", "skip_reason": "not found"}], 2, "No package could be audited"),
        (
            [
                {"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]},
                {"name": "b", "skip_reason": "not found"},
            ],
            1, "a 1: X-1; fixed in 2",
        ),
        (None, 2, "osv cannot be reached: no route"),
    ],
)  # fmt: skip
def test_audit(packages: list[dict[str, object]] | None, status: int, said: str, tmp_path: Path) -> None:
    auditor = tmp_path / "auditor"
    write = f"open(sys.argv[sys.argv.index('-o') + 1], 'w').write({json.dumps({'dependencies': packages})!r})"
    fail = "sys.exit('no route')"
    auditor.write_text(f"#!{sys.executable}\nimport sys\n{write if packages else fail}\n")
    auditor.chmod(0o755)
    command = [sys.executable, str(ROOT / ".ci" / "audit.py"), str(auditor)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status and said in done.stdout, done.stdout + done.stderr
