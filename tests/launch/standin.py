#!/usr/bin/env python3
"""Stands in for gcloud, kubectl, sbatch, squeue and scancel: records its calls and plays a scenario.

$STANDIN is a directory: calls.jsonl (every call), scenario.json (what goes wrong), and the state of the made-up cloud.
"""

import fcntl
import hashlib
import json
import os
import pathlib
import re
import sys

HOME = pathlib.Path(os.environ["STANDIN"])
SCENARIO = json.loads((HOME / "scenario.json").read_text())


def main() -> int:
    program, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
    with open(HOME / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(HOME / "calls.jsonl", "a") as calls:
            calls.write(json.dumps([program, *arguments]) + "\n")
        path = HOME / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {"resource": None, "count": {}, "installed": []}
        code = gcloud(arguments, state) if program == "gcloud" else plain(program, arguments, state)
        path.write_text(json.dumps(state))
    return code


def turn(state: dict, key: str) -> int:
    """How often this key came before."""
    state["count"][key] = state["count"].get(key, 0) + 1
    return state["count"][key] - 1


def nth(values: list, index: int):
    return values[min(index, len(values) - 1)]


def plain(program: str, arguments: list[str], state: dict) -> int:
    answers = SCENARIO.get(program, [{}])
    answer = nth(answers, turn(state, program))
    if program == "kubectl" and "apply" in arguments:
        (HOME / "manifest").write_text(sys.stdin.read())
    if program == "sbatch":
        (HOME / "batch").write_text(pathlib.Path(arguments[-1]).read_text())
    for key in (k for k in answer if k not in ("out", "code")):
        if key in arguments:
            print(answer[key])
    if "out" in answer:
        print(answer["out"])
    return answer.get("code", 0)


def gcloud(arguments: list[str], state: dict) -> int:
    kind, verb = arguments[2:4]
    # "refuses": words of a command, and how often it fails for no reason of the resource's.
    words, times = SCENARIO.get("refuses", ["", 0])
    if words and words in " ".join(arguments) and turn(state, "refused") < times:
        print("ERROR: (gcloud) HTTPError 503: the service is currently unavailable", file=sys.stderr)
        return 1
    if kind == "queued-resources":
        return queued(verb, state)
    if verb == "describe":
        if "late" in state and "--format=value(state)" in arguments:
            state["late"] -= 1
            if state["late"] < 0:
                state["node"] = "PREEMPTED"
        workers = SCENARIO.get("workers", 2)
        print(workers if "--format=value(networkEndpoints.len())" in arguments else state.get("node", "READY"))
        return 0
    if verb == "scp":
        return 0
    worker = int(next(a for a in arguments if a.startswith("--worker=")).partition("=")[2])
    command = next(a for a in arguments if a.startswith("--command=")).partition("=")[2]
    return ssh(worker, command, state)


def queued(verb: str, state: dict) -> int:
    if verb == "create":
        state.update(resource="made", node="READY", installed=[])
        state.pop("late", None)
        return 0
    if verb == "delete":
        state["resource"] = None
        return 0
    if state["resource"] is None:
        print("ERROR: (gcloud) NOT_FOUND: no such resource", file=sys.stderr)
        return 1
    print(nth(SCENARIO.get("states", ["ACTIVE"]), turn(state, "describe")))
    return 0


def ssh(worker: int, command: str, state: dict) -> int:
    step = re.match(r": (\w+);", command)[1]
    if worker == SCENARIO.get("dead_worker") or (
        [step, worker] == SCENARIO.get("fails_once") and turn(state, "once") == 0
    ):
        print("ssh: connect to host: Connection timed out", file=sys.stderr)
        return 255
    if step == "check":
        probe(worker, state)
    if step == "install":
        state["installed"].append(worker)
        state["commit"] = re.search(r"echo (\w+) > installed", command)[1]
    if step == "follow":
        index = turn(state, f"follow{worker}")
        code = nth(SCENARIO.get("codes", [[0, 0]]), index)[worker]
        # A connection that ends: "silent" before a word came, "lost" after some, "preempted" with the whole slice, and
        # "late" with it too, of which the state tells only after scenario["late"] questions.
        if code == "silent":
            return 255
        print(nth(SCENARIO.get("words", ["words of worker {}"]), index).format(worker))
        if code == "preempted":
            state["node"] = "PREEMPTED"
        if code == "late":
            state.setdefault("late", SCENARIO["late"])
        if code in ("lost", "preempted", "late"):
            return 255
        print(f"hypenet-exit-code={code}")
    return 0


def probe(worker: int, state: dict) -> None:
    ready = worker in state["installed"]
    lock = pathlib.Path(os.environ["CHECKOUT"], "requirements.lock")
    jax = SCENARIO.get("jax", {}).get(str(worker), "0.10.2")
    pinned = re.search(r"^libtpu==([^ ;\n]+)", lock.with_name("requirements-aot.lock").read_text(), re.MULTILINE)
    libtpu = SCENARIO.get("libtpu", {}).get(str(worker), pinned[1])
    print("python=3.11.9" if ready else "python=none")
    print(f"jax={jax if ready else 'none'}")
    print(f"libtpu={libtpu if ready else 'none'}")
    print(f"lock={hashlib.sha256(lock.read_bytes()).hexdigest()[:16] if ready else ''}")
    print(f"commit={state['commit'] if ready else 'none'}")
    print("running=no")


if __name__ == "__main__":
    sys.exit(main())
