"""gpu_local.sh for real with a small program; slurm.sh, gke.sh and sweep.sh against stand-ins."""

import subprocess

COMMAND = ("--", "distill", "--config", "my config.py", "--workdir", "w")
GKE = ("--name", "job", "--image", "i:1", "--accelerator", "tpu-v5-lite-podslice", "--topology", "4x4")


def program(cluster, codes: str) -> str:
    """A stand-in for hypenet that ends with one code after the other and writes its arguments down."""
    path = cluster.place / "hypenet"
    path.write_text(
        f'#!/bin/bash\ncodes=({codes})\ncd "$(dirname "$0")"\nprintf "%s\\n" "$*" >> seen\n'
        'n=$(wc -l < seen)\nexit "${codes[n-1]:-0}"\n'
    )
    path.chmod(0o755)
    return str(path)


def test_a_host_starts_again_after_75_and_only_then(cluster):
    hypenet = program(cluster, "75 75 0")
    done = cluster.run("gpu_local.sh", "--hypenet", hypenet, *COMMAND)
    assert done.returncode == 0 and len((cluster.place / "seen").read_text().splitlines()) == 3
    (cluster.place / "seen").unlink()
    assert cluster.run("gpu_local.sh", "--hypenet", program(cluster, "2 0"), *COMMAND).returncode == 2
    assert len((cluster.place / "seen").read_text().splitlines()) == 1


def test_a_host_gives_up_with_75(cluster):
    stopped = cluster.run("gpu_local.sh", "--restarts", "1", "--hypenet", program(cluster, "75 75 75"), *COMMAND)
    assert stopped.returncode == 75 and len((cluster.place / "seen").read_text().splitlines()) == 2


def test_slurm_submits_a_script_that_requeues_on_75(cluster, tmp_path):
    done = cluster.run(
        "slurm.sh", "--name", "job", "--nodes", "2", "--env", str(tmp_path), *COMMAND, sbatch=[{"out": "7"}]
    )
    assert done.returncode == 0 and "job 7" in done.stderr, done.stderr
    batch = cluster.place / "batch"
    assert "#SBATCH --nodes=2" in batch.read_text() and "#SBATCH --requeue" in batch.read_text()
    for code, requeued in ((75, True), (3, False)):
        for name, body in (
            ("srun", f'echo "$@" > {tmp_path}/srun; exit {code}'),
            ("scontrol", f"touch {tmp_path}/requeued"),
        ):
            (cluster.place / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (cluster.place / "bin" / name).chmod(0o755)
        environment = {"PATH": f"{cluster.place}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
        ran = subprocess.run(["bash", batch], env=environment, cwd=tmp_path)
        assert ran.returncode == code and (tmp_path / "requeued").exists() == requeued
        (tmp_path / "requeued").unlink(missing_ok=True)
    assert "distill --config my config.py" in (tmp_path / "srun").read_text()


def test_slurm_says_when_it_is_refused(cluster):
    refused = cluster.run("slurm.sh", "--name", "job", "--nodes", "2", *COMMAND, sbatch=[{"code": 1}])
    assert refused.returncode == 1 and "refused" in refused.stderr


def test_gke_applies_follows_and_gathers(cluster):
    done = cluster.run("gke.sh", *GKE, *COMMAND, kubectl=[{}, {"out": ""}, {"out": "Completed"}, {"out": "words"}])
    assert done.returncode == 0, done.stderr
    manifest = (cluster.place / "manifest").read_text()
    assert "completions: 4" in manifest and 'args: ["distill", "--config", "my config.py"' in manifest
    assert "@" not in manifest
    assert (cluster.place / "launch-logs/job/pods.log").read_text() == "words\n"


def test_gke_says_how_a_run_ended(cluster):
    failed = cluster.run("gke.sh", *GKE, *COMMAND, kubectl=[{}, {"out": "Failed"}])
    assert failed.returncode == 1 and "ended as Failed" in failed.stderr


def test_a_sweep_runs_every_mesh_and_keeps_each_result(cluster):
    hypenet = program(cluster, "0 3 0")
    words = ("--name", "s", "--meshes", "mesh.fsdp=8 mesh.fsdp=4,mesh.seq=2 mesh.seq=8")
    through = ("--through", f"gpu_local.sh --hypenet {hypenet}")
    done = cluster.run("sweep.sh", *words, *through, "--", "distill", "--workdir", "runs/@MESH@")
    assert done.returncode == 1
    rows = [line.split("\t")[:3] for line in (cluster.place / "launch-logs/s/results.tsv").read_text().splitlines()]
    assert rows[1:] == [["s-1", "mesh.fsdp=8", "0"], ["s-2", "mesh.fsdp=4,mesh.seq=2", "3"], ["s-3", "mesh.seq=8", "0"]]
    seen = (cluster.place / "seen").read_text().splitlines()
    assert seen[1] == "distill --workdir runs/s-2 --set mesh.fsdp=4 --set mesh.seq=2"
