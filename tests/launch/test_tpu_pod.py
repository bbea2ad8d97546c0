"""launch/tpu_pod.sh against a made-up Google Cloud."""

import pytest

POD = ("--name", "job", "--zone", "us-west4-a", "--type", "v5litepod-16")
RUN = (*POD, "--", "distill", "--config", "my config.py", "--workdir", "gs://bkt/w")


def steps(cluster, worker: int) -> list[str]:
    """What was asked of a worker by ssh."""
    mine = [call for call in cluster.calls if f"--worker={worker}" in call]
    return [next(a for a in call if a.startswith("--command=")).split()[1].rstrip(";") for call in mine]


def logs(cluster) -> dict[str, str]:
    """The files of the logs' folder, each with its first line."""
    return {p.name: p.read_text().partition("\n")[0] for p in (cluster.place / "launch-logs/job").iterdir()}


def test_from_nothing_to_done(cluster):
    done = cluster.run("tpu_pod.sh", *RUN)
    assert done.returncode == 0, done.stderr
    assert steps(cluster, 0) == steps(cluster, 1) == ["check", "mkdir", "install", "check", "mount", "start", "follow"]
    assert "words of worker 1" in (cluster.place / "launch-logs/job/worker-1-0.log").read_text()
    started = next(a for call in cluster.calls for a in call if a.startswith("--command=: start"))
    assert r"my\\\ config.py" in started
    assert "/mnt/buckets/bkt/w" in started and "gs://" not in started
    assert "remove it with --down" in done.stderr


def test_again_reuses_the_resource_and_what_is_installed(cluster):
    cluster.run("tpu_pod.sh", *RUN)
    before = len(cluster.calls)
    assert cluster.run("tpu_pod.sh", *RUN).returncode == 0
    again = cluster.calls[before:]
    assert not any("create" in call or "scp" in call for call in again)
    assert steps(cluster, 1)[-4:] == ["check", "mount", "start", "follow"]


def test_a_dead_worker_is_named_before_anything_is_installed(cluster):
    dead = cluster.run("tpu_pod.sh", *RUN, dead_worker=1)
    assert dead.returncode == 1
    assert "worker 1 cannot be reached" in dead.stderr and "timed out" in dead.stderr
    assert "install" not in steps(cluster, 0) and "start" not in steps(cluster, 0)


@pytest.mark.parametrize(("package", "needed"), [("jax", "0.10.2"), ("libtpu", "0.0.42.1")])
def test_another_version_on_one_worker_is_named_before_the_start(cluster, package, needed):
    other = cluster.run("tpu_pod.sh", *RUN, **{package: {"1": "0.0.9"}})
    assert other.returncode == 1
    assert f"worker 1 has {package} 0.0.9 where {needed} is needed" in other.stderr
    assert "start" not in steps(cluster, 0)


def test_a_local_work_directory_needs_no_bucket_and_half_a_bucket_is_a_mistake(cluster):
    local = (*POD, "--", "distill", "--config", "c.py", "--workdir", "/shared/w")
    assert cluster.run("tpu_pod.sh", *local).returncode == 0
    assert "mount" not in steps(cluster, 0)
    half = cluster.run("tpu_pod.sh", *POD, "--", "distill", "--workdir", "gs://bkt")
    assert half.returncode == 2 and "'gs://bkt' is no path in a bucket" in half.stderr


@pytest.mark.parametrize("step", ["check", "install", "mount", "follow"])
def test_an_ssh_that_fails_once_is_tried_again(cluster, step):
    done = cluster.run("tpu_pod.sh", *RUN, fails_once=[step, 1])
    assert done.returncode == 0, done.stderr
    assert steps(cluster, 1).count(step) == steps(cluster, 0).count(step) + 1


def test_a_preempted_run_is_started_again_on_the_same_resource(cluster):
    done = cluster.run("tpu_pod.sh", *RUN, codes=[[75, 75], [0, 0]])
    assert done.returncode == 0, done.stderr
    assert cluster.verbs("create", "delete") == ["create"]
    assert steps(cluster, 0).count("start") == 2


def test_a_preempted_resource_is_made_again_and_the_run_resumed(cluster):
    done = cluster.run("tpu_pod.sh", *RUN, codes=[[75, "preempted"], [0, 0]])
    assert done.returncode == 0, done.stderr
    assert cluster.verbs("create", "delete") == ["create", "delete", "create"]
    assert steps(cluster, 0).count("install") == steps(cluster, 0).count("start") == 2
    starts = {a for call in cluster.calls for a in call if a.startswith("--command=: start")}
    assert len(starts) == 1  # the same command, so the same work directory


def test_what_a_lost_worker_said_is_kept(cluster):
    """Three connections end; the later ones bring nothing or less than the first."""
    words = ["a traceback of worker {}\nand its end", "a traceback of worker {}"]
    lost = cluster.run("tpu_pod.sh", *RUN, codes=[[0, "lost"], [0, "lost"], [0, "silent"]], words=words)
    assert lost.returncode == 1 and "worker 1 was lost" in lost.stderr
    assert logs(cluster) == {"worker-0-0.log": "a traceback of worker 0", "worker-1-0.log": "a traceback of worker 1"}
    assert "and its end" in (cluster.place / "launch-logs/job/worker-1-0.log").read_text()


def test_every_restart_has_logs_of_its_own(cluster):
    words = ["first words of {}", "second words of {}"]
    done = cluster.run("tpu_pod.sh", *RUN, codes=[[75, "preempted"], [0, 0]], words=words)
    assert done.returncode == 0, done.stderr
    wanted = {f"worker-{n}-{r}.log": f"{words[r].format(n)}" for n in (0, 1) for r in (0, 1)}
    assert logs(cluster) == wanted


def test_a_launcher_that_is_started_again_overwrites_no_log(cluster):
    """A log that goes on takes its file's place; another one, of a slice that was made again, gets the next number."""
    cluster.run("tpu_pod.sh", *RUN, codes=[["lost", "lost"]], words=["run"])
    cluster.run("tpu_pod.sh", *RUN, codes=[["lost", "lost"]], words=["run"])
    assert logs(cluster) == {"worker-0-0.log": "run", "worker-1-0.log": "run"}
    (cluster.place / "launch-logs/job/worker-1.part").write_text("run\nand what a killed launcher had\n")
    cluster.run("tpu_pod.sh", *RUN, words=["another run"])
    both = {"worker-0-0.log": "run", "worker-0-1.log": "another run"}
    assert logs(cluster) == both | {"worker-1-0.log": "run", "worker-1-1.log": "another run"}
    assert "killed launcher" in (cluster.place / "launch-logs/job/worker-1-0.log").read_text()


@pytest.mark.parametrize("late", [6, 7, 10])
def test_a_preemption_that_shows_after_the_connections_ended_is_one(cluster, late):
    """Two workers ask three times each while they follow; the state may tell only after that."""
    done = cluster.run("tpu_pod.sh", *RUN, codes=[["late", "late"]] * 3 + [[0, 0]], late=late)
    assert done.returncode == 0, done.stderr
    assert cluster.verbs("create", "delete") == ["create", "delete", "create"]


def test_a_suspended_resource_is_replaced(cluster):
    done = cluster.run("tpu_pod.sh", *RUN, states=["WAITING_FOR_RESOURCES", "SUSPENDED", "ACTIVE"])
    assert done.returncode == 0, done.stderr
    assert cluster.verbs("create", "delete") == ["create", "delete", "create"]


DESCRIBES = ("queued-resources describe", "--format=value(state)", "--format=value(networkEndpoints.len())")


@pytest.mark.parametrize("describe", DESCRIBES)
def test_a_call_that_fails_says_nothing_of_the_resource(cluster, describe):
    """A running slice was once deleted for a 503."""
    done = cluster.run("tpu_pod.sh", *RUN, refuses=[describe, 2])
    assert done.returncode == 0, done.stderr
    assert cluster.verbs("create", "delete") == ["create"]


@pytest.mark.parametrize("describe", DESCRIBES)
def test_calls_that_go_on_failing_end_the_launcher_and_leave_the_resource(cluster, describe):
    cluster.run("tpu_pod.sh", *RUN)
    refused = cluster.run("tpu_pod.sh", *RUN, refuses=[describe, 9])
    assert refused.returncode == 1 and "gcloud cannot describe 'job'" in refused.stderr and "503" in refused.stderr
    assert cluster.verbs("create", "delete") == ["create"]


def test_a_refused_request_and_a_copy_that_fails_are_said(cluster):
    refused = cluster.run("tpu_pod.sh", *RUN, refuses=["queued-resources create", 1])
    assert refused.returncode == 1 and "--down removes what it may have made" in refused.stderr
    copied = cluster.run("tpu_pod.sh", *RUN, refuses=["tpu-vm scp", 9])
    assert copied.returncode == 1 and "could not be copied" in copied.stderr and "503" in copied.stderr


def test_preemptions_without_end_stop_with_their_code(cluster):
    stopped = cluster.run("tpu_pod.sh", "--restarts", "2", *RUN, codes=[[75, 75]])
    assert stopped.returncode == 75 and steps(cluster, 0).count("start") == 3


def test_a_failed_run_names_the_worker_and_keeps_the_resource(cluster):
    failed = cluster.run("tpu_pod.sh", *RUN, codes=[[0, 2]])
    assert failed.returncode == 1
    assert "worker 1 ended with exit code 2 (last words: words of worker 1)" in failed.stderr
    assert steps(cluster, 0).count("start") == 1 and cluster.verbs("delete") == []


@pytest.mark.parametrize(
    ("codes", "named"),
    [
        ([76, 1], "worker 1 ended with exit code 1"),
        ([134, 1], "worker 1 ended with exit code 1"),
        ([0, 76], "worker 1 lost another worker"),
        ([134, 76], "worker 0 lost another worker"),
    ],
)
def test_a_worker_that_lost_another_is_named_only_if_no_other_failed(cluster, codes, named):
    failed = cluster.run("tpu_pod.sh", *RUN, codes=[codes])
    assert failed.returncode == 1 and named in failed.stderr, failed.stderr


def test_a_resource_that_never_comes_ends_with_a_diagnosis(cluster):
    late = cluster.run("tpu_pod.sh", "--timeout", "1", *RUN, states=["WAITING_FOR_RESOURCES"])
    assert late.returncode == 1
    assert "still WAITING_FOR_RESOURCES after 1 s; the zone has no free v5litepod-16" in late.stderr
    assert "--down" in late.stderr


def test_a_failed_request_says_where_to_look(cluster):
    failed = cluster.run("tpu_pod.sh", *RUN, states=["FAILED"])
    assert failed.returncode == 1 and "quota" in failed.stderr


def test_down_deletes_once(cluster):
    cluster.run("tpu_pod.sh", *RUN)
    down = ("--name", "job", "--zone", "us-west4-a", "--down")
    assert cluster.run("tpu_pod.sh", *down).returncode == 0
    again = cluster.run("tpu_pod.sh", *down)
    assert again.returncode == 0 and "there is no 'job'" in again.stderr
    assert cluster.verbs("delete") == ["delete"]


def test_a_dirty_tree_is_refused_unless_told(cluster):
    (cluster.checkout / "requirements-aot.lock").write_text("libtpu==1\n")
    refused = cluster.run("tpu_pod.sh", *RUN)
    assert refused.returncode == 2 and "--allow-dirty" in refused.stderr and cluster.calls == []
    told = cluster.run("tpu_pod.sh", "--allow-dirty", *RUN)
    assert told.returncode == 0, told.stderr
