"""gpu_local.sh for real with a small program; slurm.sh, gke.sh and sweep.sh against stand-ins."""

import pathlib
import re
import signal
import subprocess
import time

import pytest
import yaml

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
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


# A shell cannot trap what it was started to ignore, and so are commands in the background, these tests perhaps.
AS_IN_A_TERMINAL = ("env", "--default-signal=INT")


def test_a_host_passes_a_signal_on_and_does_not_start_again(cluster):
    path = cluster.place / "hypenet"
    path.write_text(
        '#!/bin/bash\ncd "$(dirname "$0")"\ntrap "sleep 0.2; echo saved >> seen; exit 75" TERM\n'
        "echo start >> seen\nwhile true; do sleep 0.05; done\n"
    )
    path.chmod(0o755)
    for sent in (signal.SIGTERM, signal.SIGINT):
        (cluster.place / "seen").unlink(missing_ok=True)
        launcher = subprocess.Popen(
            [*AS_IN_A_TERMINAL, cluster.checkout / "launch/gpu_local.sh", "--hypenet", path, *COMMAND], process_group=0
        )
        while not (cluster.place / "seen").exists():
            time.sleep(0.02)
        time.sleep(0.2)
        launcher.send_signal(sent)
        assert launcher.wait(timeout=20) == 75
        assert (cluster.place / "seen").read_text().split() == ["start", "saved"]


def test_slurm_waits_for_the_jobs_own_code(cluster, tmp_path):
    words = ("slurm.sh", "--name", "job", "--nodes", "2", "--wait", "--logs", str(tmp_path / "logs"), *COMMAND)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/7.code").write_text("3\n")
    done = cluster.run(*words, sbatch=[{"out": "7"}], squeue=[{"out": "RUNNING"}, {}])
    assert done.returncode == 3 and "exit code 3" in done.stderr, done.stderr
    lost = cluster.run(*words, sbatch=[{"out": "8"}], squeue=[{}])
    assert lost.returncode == 1 and "before it could tell" in lost.stderr


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
        assert (cluster.place / "launch-logs/job/7.code").read_text() == f"{code}\n"
        (tmp_path / "requeued").unlink(missing_ok=True)
    assert "distill --config my config.py" in (tmp_path / "srun").read_text()


def test_slurm_says_when_it_is_refused(cluster):
    refused = cluster.run("slurm.sh", "--name", "job", "--nodes", "2", *COMMAND, sbatch=[{"code": 1}])
    assert refused.returncode == 1 and "refused" in refused.stderr


def test_gke_applies_follows_and_gathers(cluster):
    done = cluster.run(
        "gke.sh",
        *GKE,
        *COMMAND,
        kubectl=[{}, {"out": "/"}, {"out": "first words"}, {"out": "1/Completed"}, {"out": "words"}],
    )
    assert done.returncode == 0, done.stderr
    manifest = (cluster.place / "manifest").read_text()
    assert "completions: 4" in manifest and 'args: ["distill", "--config", "my config.py"' in manifest
    assert "@" not in manifest and "bucket" not in manifest
    logs = cluster.place / "launch-logs/job"
    assert {p.name: p.read_text() for p in logs.iterdir()} == {"pods-0.log": "first words\n", "pods-1.log": "words\n"}
    assert "started again (1 of 20)" in done.stderr


def test_gke_mounts_the_bucket_that_the_command_names(cluster):
    words = ("--", "distill", "--workdir", "gs://my-bucket/w")
    assert cluster.run("gke.sh", *GKE, *words, kubectl=[{}, {"out": "0/Completed"}]).returncode == 0
    manifest = (cluster.place / "manifest").read_text()
    assert 'args: ["distill", "--workdir", "/mnt/buckets/my-bucket/w"]' in manifest and "@" not in manifest
    pod = yaml.safe_load(manifest)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["spec"]["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    mounts = pod["spec"]["containers"][0]["volumeMounts"]
    assert mounts == [{"name": "bucket", "mountPath": "/mnt/buckets/my-bucket"}]
    options = pod["spec"]["volumes"][0]["csi"]["volumeAttributes"]["mountOptions"].split(",")
    # Who the image's user is may write there, and what one pod wrote another one sees at once.
    assert "useradd --create-home --uid 1000 " in (REPOSITORY / "Dockerfile").read_text()
    assert {"uid=1000", "gid=1000", "file-mode=664", "dir-mode=775"} <= set(options)
    assert {"metadata-cache:ttl-secs:0", "metadata-cache:negative-ttl-secs:0"} <= set(options)
    two = cluster.run("gke.sh", *GKE, *words, "--set", "gs://other-bucket/x")
    assert two.returncode == 2 and "use one" in two.stderr


def words_in_the_pod(text: str) -> str:
    """A word of `args` as Kubernetes gives it to the program: $$ is a dollar, $(NAME) a variable where there is one."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda found: "$" if found[1] is None else "EXPANDED", text)


def container_of(cluster) -> dict:
    """The container of the manifest that was applied."""
    manifest = yaml.safe_load((cluster.place / "manifest").read_text())
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


ODD_WORDS = (
    "one\ntwo\tthree", "$(HOME)", "a $$ b $x $", "$$(HOME)", 'quo"te', "back\\slash\\n", "@BUCKET@",
    "@NAME@ @ARGUMENTS@", "# bucket: x", "@MOUNT@", "a&b", "", "é '[1, 2]' {x: y}", "*", "--set",
)  # fmt: skip


@pytest.mark.parametrize("workdir", ["/w", "gs://my-bucket/a $(b) # bucket: @NAME@"])
def test_gke_gives_every_word_to_the_program_as_it_is(cluster, workdir):
    words = ("distill", *ODD_WORDS, "--workdir", workdir)
    done = cluster.run("gke.sh", *GKE, "--", *words, kubectl=[{}, {"out": "0/Completed"}])
    assert done.returncode == 0, done.stderr
    manifest, container = yaml.safe_load((cluster.place / "manifest").read_text()), container_of(cluster)
    wanted = [*words[:-1], workdir.replace("gs://", "/mnt/buckets/")]
    assert [words_in_the_pod(word) for word in container["args"]] == wanted
    assert ("volumeMounts" in container) == workdir.startswith("gs://")
    assert container["image"] == "i:1" and manifest["metadata"]["name"] == "job"


def test_gke_names_that_yaml_would_read_otherwise(cluster):
    words = ("--name", "true", *GKE[2:4], "--accelerator", "123", "--topology", "4x4", "--service-account", "1.5")
    assert cluster.run("gke.sh", *words, *COMMAND, kubectl=[{}, {"out": "0/Completed"}]).returncode == 0
    manifest = yaml.safe_load((cluster.place / "manifest").read_text())
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert manifest["metadata"]["name"] == "true" and pod["serviceAccountName"] == "1.5"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "123"


def test_gke_refuses_what_no_manifest_holds(cluster):
    refused = cluster.run("gke.sh", *GKE, "--", "generate", "--prompt", "a\x07b")
    assert refused.returncode == 2 and "control character" in refused.stderr and cluster.calls == []
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("word", ["--workdir=gs://my-bucket/w", "teacher=gs://my-bucket/w"])
def test_a_bucket_behind_an_equals_sign_is_mounted_too(cluster, word):
    assert cluster.run("gke.sh", *GKE, "--", "distill", word, kubectl=[{}, {"out": "0/Completed"}]).returncode == 0
    manifest = (cluster.place / "manifest").read_text()
    assert word.replace("gs://", "/mnt/buckets/") in manifest and "bucketName" in manifest
    refused = cluster.run("gke.sh", *GKE, "--", "distill", "--workdir=gs://b")
    assert refused.returncode == 2 and "'gs://b' is no path in a bucket" in refused.stderr


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ('data.sources=["gs://bkt/a b", "stdlib", "gs://bkt/c"]',
         'data.sources=["/mnt/buckets/bkt/a b", "stdlib", "/mnt/buckets/bkt/c"]'),
        ("data.heldout=('gs://bkt/x',)", "data.heldout=('/mnt/buckets/bkt/x',)"),
        ("--set=data.sources=['gs://bkt/x']", "--set=data.sources=['/mnt/buckets/bkt/x']"),
        ("--set=teacher=gs://bkt/x", "--set=teacher=/mnt/buckets/bkt/x"),
        ('s=["retrieval:9:haystack=gs://bkt/x"]', 's=["retrieval:9:haystack=/mnt/buckets/bkt/x"]'),
        ('["gs://bkt/x"]', '["gs://bkt/x"]'),  # no option's value: a prompt, say
        ("what is gs://bkt/x", "what is gs://bkt/x"),
    ],
)  # fmt: skip
def test_buckets_in_a_list_are_mounted_too(cluster, word, wanted):
    done = cluster.run("gke.sh", *GKE, "--", "distill", "--set", word, kubectl=[{}, {"out": "0/Completed"}])
    assert done.returncode == 0, done.stderr
    container = container_of(cluster)
    assert words_in_the_pod(container["args"][2]) == wanted
    assert ("volumeMounts" in container) == (word != wanted)


@pytest.mark.parametrize("word", ['data.sources=["gs://b"]', "data.sources=['stdlib', 'gs://bkt']"])
def test_half_a_bucket_in_a_list_is_a_mistake(cluster, word):
    refused = cluster.run("gke.sh", *GKE, "--", "distill", "--set", word)
    assert refused.returncode == 2 and "is no path in a bucket" in refused.stderr and cluster.calls == []


def test_gke_says_how_a_run_ended(cluster):
    failed = cluster.run("gke.sh", *GKE, *COMMAND, kubectl=[{}, {"out": "0/Failed"}])
    assert failed.returncode == 1 and "ended as Failed" in failed.stderr


WAITS = {
    "jobset": "0//0",
    "pods": "job-slice-0-2-x job-slice-0-3-y",
    "describe": "Name: job\nEvents:\n  Warning  FailedScheduling  2m   default-scheduler  0/3 nodes are available",
}


def test_gke_says_why_pods_are_not_scheduled(cluster):
    late = cluster.run("gke.sh", *GKE, "--timeout", "1", *COMMAND, kubectl=[WAITS])
    assert late.returncode == 1, late.stderr
    last = late.stderr.splitlines()[-1]
    assert "'job' is not running on all hosts after 1 s" in last
    assert "(pod job-slice-0-2-x: Warning FailedScheduling 2m default-scheduler " in last
    assert "0/3 nodes are available" in last and "--timeout" in last and "--down" in last
    assert not any("delete" in call for call in cluster.calls)
    described = next(call for call in cluster.calls if "describe" in call)
    assert described == ["kubectl", "--namespace=default", "describe", "pod", "job-slice-0-2-x"]


def test_gke_asks_the_jobset_itself_where_there_are_no_pods(cluster):
    late = cluster.run("gke.sh", *GKE, "--timeout", "0", *COMMAND, kubectl=[WAITS | {"pods": ""}])
    assert late.returncode == 1 and "(jobset job: " in late.stderr
    assert ["kubectl", "--namespace=default", "describe", "jobset", "job"] in cluster.calls


def test_gke_waits_as_long_as_it_likes_for_pods_that_run(cluster):
    runs = [{}, *[{"jobset": "0//1"}] * 8, {"jobset": "0/Completed/1"}]
    done = cluster.run("gke.sh", *GKE, "--timeout", "0", *COMMAND, kubectl=runs)
    assert done.returncode == 0, done.stderr
    again = [{}, *[{"jobset": "0//1"}] * 4, WAITS | {"jobset": "1//0"}]
    late = cluster.run("gke.sh", *GKE, "--timeout", "1", *COMMAND, kubectl=again)
    assert late.returncode == 1 and "after 1 s" in late.stderr  # counted from the restart on


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


def test_a_sweep_over_a_slice_makes_one_resource(cluster):
    words = ("--name", "s", "--meshes", "mesh.fsdp=16 mesh.fsdp=8,mesh.seq=2")
    through = ("--through", "tpu_pod.sh --zone z --type v5litepod-16")
    done = cluster.run("sweep.sh", *words, *through, "--", "distill", "--workdir", "gs://bkt/@MESH@")
    assert done.returncode == 0, done.stderr
    assert cluster.verbs("create", "delete") == ["create"]
    logs = cluster.place / "launch-logs/s"
    assert {path.name for path in logs.iterdir()} == {"results.tsv", "s-1", "s-1.log", "s-2", "s-2.log"}
    assert (logs / "s-2/worker-0-0.log").is_file() and "remove it with --down" in (logs / "s-2.log").read_text()
