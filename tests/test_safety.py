"""What the code never does with files and answers from elsewhere, read off its source; and the audit's exit status."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from draftopd.targets.target import Target, load_tokenizer

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "src").rglob("*.py")), ROOT / "train.py", ROOT / "eval.py"]

#: Calls that run what they read.
RUNS = {
    "eval", "exec", "compile", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load",
    "marshal.loads", "shelve.open", "yaml.load", "os.system", "os.popen", "runpy.run_path", "torch.hub.load",
    "numpy.load", "np.load", "shutil.unpack_archive",
}  # fmt: skip


def calls() -> Iterator[tuple[str, str, dict[str, object]]]:
    """``(place, name, keyword arguments)`` of every call; arguments that are no constants are ``...``."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                options = {
                    k.arg or "**": k.value.value if isinstance(k.value, ast.Constant) else ... for k in node.keywords
                }
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), options


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
    for load in (Target.load, load_tokenizer):
        assert inspect.signature(load).parameters["trust_remote_code"].default is False
    for path in sorted((ROOT / "configs" / "target").glob("*.yaml")):
        assert OmegaConf.load(path).target.trust_remote_code is False, path
    assert not [place for place, _, options in calls() if options.get("trust_remote_code") is True]


def test_only_the_commands_know_hydra() -> None:
    """So that no checkpoint, buffer or answer can name a class to be made."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "hydra" for name in names):
                assert path.parent.name == "cli" or path.parent == ROOT, path
    made = {place.rpartition(":")[0] for place, name, _ in calls() if name.endswith("instantiate")}
    assert made == {f"src/draftopd/cli/{name}.py" for name in ("training", "evaluation", "planning")}


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
