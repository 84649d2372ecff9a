"""Known vulnerabilities of the packages in this environment: ``make audit``.

pip-audit asks PyPI, or OSV, about every release. What it could not ask about counts as not audited here, and nothing
audited is no success: pip-audit by itself says "no known vulnerabilities" then too.

Exit status: 0 where no audited package has a known one, 1 where one has, 2 where none could be audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any


def installed(own: str) -> list[str]:
    """``NAME==VERSION`` of every package but ours; PyPI knows no local versions such as ``2.9.0+cpu``."""
    found = {d.metadata["Name"]: d.version.partition("+")[0] for d in distributions()}
    return sorted(f"{name}=={version}" for name, version in found.items() if name and name.lower() != own)


def audit(auditor: str, service: str) -> list[dict[str, Any]] | None:
    """What the service says of each package; None where it cannot be reached."""
    with tempfile.TemporaryDirectory() as place:
        wanted, found = Path(place) / "installed.txt", Path(place) / "audit.json"
        wanted.write_text("\n".join(installed("draftopd")) + "\n")
        command = [auditor, "-r", str(wanted), "--no-deps", "--disable-pip", "-s", service, "-f", "json"]
        command += ["-o", str(found), "--progress-spinner", "off", "--timeout", "10"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if not found.exists():
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            print(f"{service} cannot be reached: {lines[-1][:200]}")
            return None
        packages: list[dict[str, Any]] = json.loads(found.read_text())["dependencies"]
    skipped = [p for p in packages if "skip_reason" in p]
    print(f"{service}: {len(packages) - len(skipped)} packages audited, {len(skipped)} could not be.")
    return None if len(skipped) == len(packages) else packages


def main() -> int:
    packages = audit(sys.argv[1], "pypi") or audit(sys.argv[1], "osv")
    if packages is None:
        print("No package could be audited: neither service gave its advisories. Run this where they can be reached.")
        return 2
    worst = [p for p in packages if p.get("vulns")]
    for package in worst:
        known = ", ".join(v["id"] for v in package["vulns"])
        fixed = sorted({f for v in package["vulns"] for f in v["fix_versions"]})
        print(f"{package['name']} {package['version']}: {known}; fixed in {', '.join(fixed) or 'no release yet'}")
    print(f"{len(worst)} packages with known vulnerabilities.")
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
