"""A small git checkout with the launchers in it, and stand-ins for a cluster's programs on PATH."""

import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

HERE = pathlib.Path(__file__).parent
REPOSITORY = HERE.parents[1]
PROGRAMS = ("gcloud", "kubectl", "sbatch", "squeue", "scancel", "sacct")


class Cluster:
    """Runs launchers against the stand-ins; `calls` is what these were asked, in order."""

    def __init__(self, place: pathlib.Path) -> None:
        self.place, self.checkout = place, place / "checkout"
        shutil.copytree(REPOSITORY / "launch", self.checkout / "launch")
        for lock in ("requirements.lock", "requirements-aot.lock"):
            shutil.copy(REPOSITORY / lock, self.checkout)
        for command in (["init", "-q"], ["add", "-A"], ["-c", "commit.gpgsign=false", "commit", "-qm", "all"]):
            who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
            subprocess.run(["git", "-C", self.checkout, *who, *command], check=True)
        (place / "bin").mkdir()
        for program in PROGRAMS:
            shutil.copy(HERE / "standin.py", place / "bin" / program)
            (place / "bin" / program).chmod(0o755)

    def run(
        self, script: str, *arguments: str, path: str | None = None, **scenario: Any
    ) -> subprocess.CompletedProcess:
        (self.place / "scenario.json").write_text(json.dumps(scenario))
        environment = dict(
            os.environ,
            PATH=path or f"{self.place / 'bin'}:{os.environ['PATH']}",
            STANDIN=str(self.place),
            CHECKOUT=str(self.checkout),
            HYPENET_POLL_SECONDS="0",
            GIT_AUTHOR_NAME="test", GIT_AUTHOR_EMAIL="test@localhost",
            GIT_COMMITTER_NAME="test", GIT_COMMITTER_EMAIL="test@localhost",
        )  # fmt: skip
        command = [str(self.checkout / "launch" / script), *arguments]
        return subprocess.run(command, cwd=self.place, env=environment, capture_output=True, text=True, timeout=60)

    @property
    def calls(self) -> list[list[str]]:
        path = self.place / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self, *wanted: str) -> list[str]:
        """The wanted verbs in the order in which they were asked for."""
        return [word for call in self.calls for word in call[4:5] if word in wanted]


@pytest.fixture
def cluster(tmp_path) -> Callable:
    return Cluster(tmp_path)
