"""What public CI and the commit hooks run is what the README and the Makefile name."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_ci_runs_the_commands_of_the_readme_and_the_makefile_has_them():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    steps = [step for job in yaml.safe_load(workflow)["jobs"].values() for step in job["steps"]]
    runs = " ".join(step.get("run", "") for step in steps)
    targets = set(re.findall(r"make ([\w-]+)", runs))
    assert targets == {"lint", "test-fast", "quickstart"}
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"make {target}" in readme for target in targets - {"lint"})


def test_commit_hooks_are_make_lint_with_the_same_ruff():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert repository["rev"] == f"v{pinned}"
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert re.findall(r"ruff (\w+)", lint) == [hook["id"].removeprefix("ruff-") for hook in repository["hooks"]]
