#!/usr/bin/env bash
# A hypenet command on every worker of a Cloud TPU slice, from nothing to the finished run.
#
# Everything is found again by the job's name: the queued resource and its node carry it, and each worker keeps the run
# under ~/hypenet-NAME (code, environment, run.log, run.pid, run.exit). A launcher that was killed is started again.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

help() {
  cat <<'HELP'
usage: launch/tpu_pod.sh --name NAME --zone ZONE --type TYPE [options] -- <hypenet command>
       launch/tpu_pod.sh --name NAME --zone ZONE --down

Create or reuse a queued resource, install this commit on every worker, run the command on all of them, gather their
logs, and restart after a preemption. The same command again continues to follow a run that goes on. A bucket that the
command names (gs://BUCKET/FOLDER) is mounted with gcsfuse on every worker.

  --name NAME             the job: names the queued resource and its node
  --zone ZONE             such as us-west4-a
  --type TYPE             accelerator type, such as v5litepod-16, v5p-64, v6e-64
  --runtime VERSION       software version of the TPU VM (by default the one that fits TYPE)
  --project PROJECT       by default gcloud's own
  --service-account MAIL  whom the workers act as (the bucket must let it write)
  --spot                  cheaper, and may be preempted
  --restarts N            times that a preempted run is started again (default 20)
  --timeout SECONDS       how long to wait for the resource (default 7200)
  --logs DIR              where the workers' logs go (default launch-logs/NAME)
  --allow-dirty           launch tracked files as they are, changes included
  --delete-after          delete the resource when the run has ended well
  --down                  delete the resource and everything on its workers
  --dry-run               print every command, run none

exit codes: 0 done, 1 failed (the sentence names the worker), 2 a mistake in the input, 75 preempted once too often

example:
  launch/tpu_pod.sh --name halo-2b --zone us-west4-a --type v5litepod-16 --spot -- \
    distill --config configs/my_config.py --workdir gs://my-bucket/halo-2b
HELP
}

NAME='' ZONE='' TYPE='' RUNTIME='' PROJECT='' SERVICE_ACCOUNT='' SPOT=0 RESTARTS=20 TIMEOUT=7200 LOGS=''
ALLOW_DIRTY=0 DELETE_AFTER=0 DOWN=0 DRY_RUN=0 COMMAND=()
POLL=${HYPENET_POLL_SECONDS:-20}

parse() {
  while (($# > 0)); do
    case $1 in
      --name | --zone | --type | --runtime | --project | --service-account | --restarts | --timeout | --logs)
        need_value "$1" $#
        case $1 in
          --name) NAME=$2 ;;
          --zone) ZONE=$2 ;;
          --type) TYPE=$2 ;;
          --runtime) RUNTIME=$2 ;;
          --project) PROJECT=$2 ;;
          --service-account) SERVICE_ACCOUNT=$2 ;;
          --restarts) check_number "$1" "$2" && RESTARTS=$2 ;;
          --timeout) check_number "$1" "$2" && TIMEOUT=$2 ;;
          --logs) LOGS=$2 ;;
        esac
        shift 2
        ;;
      --spot) SPOT=1 && shift ;;
      --allow-dirty) ALLOW_DIRTY=1 && shift ;;
      --delete-after) DELETE_AFTER=1 && shift ;;
      --down) DOWN=1 && shift ;;
      --dry-run) DRY_RUN=1 && shift ;;
      --help | -h) help && exit 0 ;;
      --) shift && COMMAND=("$@") && break ;;
      *) usage_error "unknown argument '$1'; see --help" ;;
    esac
  done
  check_name "$NAME"
  [[ -n $ZONE ]] || usage_error "there is no zone; give --zone, such as us-west4-a"
  [[ $ZONE =~ ^[a-z0-9-]+$ ]] || usage_error "the zone is '$ZONE'; give one such as us-west4-a"
  [[ $PROJECT =~ ^[a-z0-9:.-]*$ ]] || usage_error "the project is '$PROJECT'; give its id"
  need_program gcloud "install the Google Cloud CLI"
  LOGS=${LOGS:-launch-logs/$NAME}
  WHERE=("--zone=$ZONE")
  [[ -z $PROJECT ]] || WHERE+=("--project=$PROJECT")
  ((DOWN)) && return
  check_command "${COMMAND[@]}"
  mount_buckets_of_command
  [[ -n $TYPE ]] || usage_error "there is no accelerator type; give --type, such as v5litepod-16"
  [[ $TYPE =~ ^[a-z0-9-]+$ ]] || usage_error "the type '$TYPE' is none of the Cloud's; give --type, such as v5litepod-16"
  RUNTIME=${RUNTIME:-$(runtime_of "$TYPE")}
  [[ -n $RUNTIME ]] || usage_error "the type '$TYPE' has no known software version; give --runtime"
}

runtime_of() {
  case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

# The commit to launch: HEAD, or a commit object of the changed tree that no branch holds.
choose_commit() {
  git -C "$ROOT" rev-parse HEAD >/dev/null 2>&1 || usage_error "$ROOT is no git checkout; launch from a clone"
  COMMIT=$(git -C "$ROOT" rev-parse HEAD)
  if [[ -n $(git -C "$ROOT" status --porcelain --untracked-files=no) ]]; then
    ((ALLOW_DIRTY)) || usage_error "the working tree has changes that no commit holds; commit them or give --allow-dirty"
    COMMIT=$(git -C "$ROOT" stash create)
  fi
  LOCK=$(git -C "$ROOT" show "$COMMIT:requirements.lock" | sha256sum | cut -c1-16)
  JAX=$(git -C "$ROOT" show "$COMMIT:requirements.lock" | sed -n 's/^jax==//p')
  # The workers have Python 3.11.
  LIBTPU=$(git -C "$ROOT" show "$COMMIT:requirements-aot.lock" | sed -n '/python_version >= /d; s/^libtpu==\([^ ;]*\).*/\1/p')
}

queued() { run gcloud compute tpus queued-resources "$1" "$NAME" "${WHERE[@]}" "${@:2}"; }

ssh_to() { # WORKER COMMAND
  run gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" "--worker=$1" --quiet \
    '--ssh-flag=-o ServerAliveInterval=30' "--command=$2"
}

# What a describing command says, or ABSENT where gcloud finds nothing. Tried three times: a call that failed says
# nothing of the resource, which may well be running.
described() {
  local attempt words=$SCRATCH/describe.$BASHPID
  for attempt in 1 2 3; do
    "$@" 2>"$words" && return
    grep -qi 'not.found' "$words" && echo ABSENT && return
    ((attempt == 3)) || sleep "$POLL"
  done
  fail "gcloud cannot describe '$NAME' in $ZONE: $(tail -n 1 "$words"); nothing was changed, the same command goes on"
}

node() { gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" "--format=value($1)"; }

# ABSENT, a state of the queued resource, or PREEMPTED where it is active and its node is gone.
resource_state() {
  local state node
  state=$(described queued describe '--format=value(state.state)')
  if [[ $state == ACTIVE ]]; then
    node=$(described node state)
    case $node in PREEMPTED | TERMINATED | STOPPED | ABSENT) state=PREEMPTED ;; esac
  fi
  echo "$state"
}

create() {
  local options=("--node-id=$NAME" "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME")
  ((SPOT)) && options+=(--spot)
  [[ -z $SERVICE_ACCOUNT ]] || options+=("--service-account=$SERVICE_ACCOUNT")
  say "asking for $TYPE in $ZONE as '$NAME'"
  queued create "${options[@]}" --quiet || fail "gcloud could not create '$NAME'; its words are above, --down removes what it may have made"
}

delete() { queued delete --force --quiet || fail "'$NAME' could not be deleted; run again with --down, for it may cost money"; }

advice() { # what a state that lasts means
  case $1 in
    CREATING | ACCEPTED | WAITING_FOR_RESOURCES) echo "the zone has no free $TYPE: wait longer (--timeout), try another zone, or drop --spot" ;;
    PROVISIONING) echo "the machines are being made: run the same command again" ;;
    FAILED) echo "the request failed, most often by quota: see 'gcloud compute tpus queued-resources describe $NAME --zone $ZONE'" ;;
    *) echo "see 'gcloud compute tpus queued-resources describe $NAME --zone $ZONE'" ;;
  esac
}

# Make the resource where there is none, replace one that was preempted, and wait until it is active.
ensure_active() {
  local start=$SECONDS state last=''
  while true; do
    state=$(resource_state)
    [[ $state == "$last" ]] || say "'$NAME' is $state"
    last=$state
    case $state in
      ACTIVE) return ;;
      ABSENT) create && continue ;;
      SUSPENDED | PREEMPTED) say "'$NAME' was preempted; it is deleted and asked for again" && delete ;;
      FAILED) fail "'$NAME' is FAILED; $(advice FAILED); remove it with --down" ;;
    esac
    ((SECONDS - start < TIMEOUT)) ||
      fail "'$NAME' is still $state after $TIMEOUT s; $(advice "$state"); it stays in the queue, remove it with --down"
    sleep "$POLL"
  done
}

count_workers() {
  WORKERS=$(described node 'networkEndpoints.len()')
  [[ $WORKERS =~ ^[1-9][0-9]*$ ]] || fail "the node '$NAME' lists no workers; delete it with --down and start again"
}

# One remote command on every worker at a time, tried three times where ssh itself fails; output in $SCRATCH/STEP.N.
# Sets FAILED to the workers on which it did not succeed.
on_each() { # STEP COMMAND
  local worker pids=()
  for ((worker = 0; worker < WORKERS; worker++)); do
    (
      for attempt in 1 2 3; do
        code=0
        ssh_to "$worker" ": $1; $2" >"$SCRATCH/$1.$worker" 2>"$SCRATCH/$1.$worker.errors" || code=$?
        [[ $code == 255 ]] || exit "$code"
        ((attempt == 3)) || sleep "$POLL"
      done
      exit "$code"
    ) &
    pids+=($!)
  done
  FAILED=()
  for ((worker = 0; worker < WORKERS; worker++)); do
    wait "${pids[worker]}" || FAILED+=("$worker")
  done
}

demand() { # STEP SENTENCE: every worker must have succeeded
  ((${#FAILED[@]} == 0)) || fail "worker ${FAILED[*]} $2 (last words: $(tail -qn 1 "$SCRATCH/$1.${FAILED[0]}.errors"))"
}

# Single quotes are for the worker's shell to expand.
# shellcheck disable=SC2016
PROBE='cd ~/hypenet-'"%s"' 2>/dev/null || cd ~
echo "python=$(.venv/bin/python -c "import platform; print(platform.python_version())" 2>/dev/null || echo none)"
echo "jax=$(.venv/bin/python -c "import importlib.metadata as m; print(m.version(\\"jax\\"))" 2>/dev/null || echo none)"
echo "libtpu=$(.venv/bin/python -c "import importlib.metadata as m; print(m.version(\\"libtpu\\"))" 2>/dev/null || echo none)"
echo "lock=$(sha256sum code/requirements.lock 2>/dev/null | cut -c1-16)"
echo "commit=$(cat installed 2>/dev/null || echo none)"
echo "running=$(if [ -e run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null; then echo yes; else echo no; fi)"'

# shellcheck disable=SC2016
INSTALL='set -e; cd ~/hypenet-%s; rm -rf installed code; mkdir code; tar -xzf ~/hypenet-%s.tar.gz -C code
if ! python3.11 -c "import ensurepip" 2>/dev/null; then
  sudo apt-get -o DPkg::Lock::Timeout=300 update -qq && sudo apt-get -o DPkg::Lock::Timeout=300 install -yqq python3.11 python3.11-venv
fi
python3.11 -m venv .venv
.venv/bin/pip install -q --disable-pip-version-check --no-deps -r code/requirements.lock
grep "^libtpu==" code/requirements-aot.lock > libtpu.lock
.venv/bin/pip install -q --disable-pip-version-check --no-deps -r libtpu.lock
.venv/bin/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e code
echo %s > installed'

# Nothing is cached of the bucket's names: a worker has to see at once what another has written.
# shellcheck disable=SC2016
MOUNT='set -e
if ! command -v gcsfuse >/dev/null; then
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/gcsfuse.asc >/dev/null
  echo "deb [signed-by=/usr/share/keyrings/gcsfuse.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -o DPkg::Lock::Timeout=300 update -qq && sudo apt-get -o DPkg::Lock::Timeout=300 install -yqq gcsfuse
fi
for bucket in %s; do
  mountpoint -q '"$BUCKET_ROOT"'/$bucket && continue
  sudo mkdir -p '"$BUCKET_ROOT"'/$bucket && sudo chown "$USER" '"$BUCKET_ROOT"'/$bucket
  gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    $bucket '"$BUCKET_ROOT"'/$bucket
done'

# shellcheck disable=SC2016
START='cd ~/hypenet-%s
if [ -e run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null; then
  [ "$(cat run.command)" = %s ] || { echo "another command is running: $(cat run.command)" >&2; exit 3; }
  exit 0
fi
rm -f run.exit; echo %s > run.command; touch run.log
setsid nohup bash -c "cd code; HYPENET_CLUSTER=auto JAX_PLATFORMS=tpu,cpu ../.venv/bin/hypenet $(cat run.command); echo \\$? > ../run.exit" >> run.log 2>&1 < /dev/null &
echo $! > run.pid'

# shellcheck disable=SC2016
FOLLOW='cd ~/hypenet-%s && tail -n +1 --pid="$(cat run.pid)" -f run.log; echo "hypenet-exit-code=$(cat run.exit)"'

# shellcheck disable=SC2059
probe() {
  on_each check "$(printf "$PROBE" "$NAME")"
  demand check "cannot be reached by ssh; delete the resource with --down and start again if it stays so"
}

field() { sed -n "s/^$1=//p" "$SCRATCH/check.$2" | tail -n 1; }

# Reachability and versions first; copy and install only where a worker has another commit, and then look again.
# shellcheck disable=SC2059
prepare() {
  local worker stale=0
  probe
  for ((worker = 0; worker < WORKERS; worker++)); do
    if [[ $(field commit "$worker") != "$COMMIT" ]]; then
      [[ $(field running "$worker") != yes ]] ||
        fail "worker $worker still runs commit $(field commit "$worker"); wait for it, or end it with --down"
      stale=1
    fi
  done
  if ((stale)); then
    say "installing ${COMMIT:0:12} on $WORKERS worker(s)"
    git -C "$ROOT" archive --format=tar.gz -o "$SCRATCH/hypenet-$NAME.tar.gz" "$COMMIT"
    on_each mkdir "mkdir -p ~/hypenet-$NAME"
    demand mkdir "cannot make a directory"
    copy
    on_each install "$(printf "$INSTALL" "$NAME" "$NAME" "$COMMIT")"
    demand install "cannot install from the lock file"
    probe
  fi
  for ((worker = 0; worker < WORKERS; worker++)); do
    same python "$worker" "$(field python 0)"
    same jax "$worker" "$JAX"
    same libtpu "$worker" "$LIBTPU"
    same lock "$worker" "$LOCK"
  done
  say "$WORKERS worker(s) answer: Python $(field python 0), jax $JAX, libtpu $LIBTPU, lock $LOCK"
}

# shellcheck disable=SC2059
mount_buckets() {
  ((${#BUCKETS[@]} > 0)) || return 0
  on_each mount "$(printf "$MOUNT" "${BUCKETS[*]}")"
  demand mount "cannot mount the bucket ${BUCKETS[*]}; may its service account (--service-account) write there?"
}

copy() {
  gcloud compute tpus tpu-vm scp "$SCRATCH/hypenet-$NAME.tar.gz" "$NAME:" "${WHERE[@]}" --worker=all --quiet \
    >"$SCRATCH/copy" 2>&1 || fail "the code could not be copied to the workers (last words: $(tail -n 1 "$SCRATCH/copy"))"
}

same() { # WHAT WORKER EXPECTED
  local found
  found=$(field "$1" "$2")
  [[ $found == "$3" ]] ||
    fail "worker $2 has $1 ${found:-none} where $3 is needed; delete the resource with --down and start again"
}

# shellcheck disable=SC2059
start() {
  local words
  words=$(printf '%q' "$(quoted "${COMMAND[@]}")")
  on_each start "$(printf "$START" "$NAME" "$words" "$words")"
  demand start "cannot start the command"
}

same_beginning() { # FILE FILE: one of them goes on where the other ends
  local one two
  one=$(wc -c <"$1") two=$(wc -c <"$2")
  cmp -s -n "$((one < two ? one : two))" "$1" "$2"
}

# What came of a worker's log becomes worker-N-R.log, R the restart. A connection that ends early takes nothing from what
# an earlier one brought, and a log that is not the same run's (of a launcher before this one) is left: R is raised then.
keep() { # WORKER RESTART
  local part=$LOGS/worker-$1.part number=$2 log
  [[ -s $part ]] || { rm -f "$part" && return; }
  while log=$LOGS/worker-$1-$number.log && [[ -e $log ]] && ! same_beginning "$part" "$log"; do
    number=$((number + 1))
  done
  if [[ -e $log ]] && (($(wc -c <"$part") < $(wc -c <"$log"))); then rm "$part"; else mv "$part" "$log"; fi
  echo "$log" >"$SCRATCH/log.$1"
}

# Wait for the end on every worker; CODES[n] is its exit code, or "lost" where three connections ended without one.
# shellcheck disable=SC2059
follow() { # RESTART
  local worker attempt part pids=()
  mkdir -p "$LOGS"
  for ((worker = 0; worker < WORKERS; worker++)); do
    part=$LOGS/worker-$worker.part
    keep "$worker" 0 # a launcher that was killed has left it
    (
      for attempt in 1 2 3; do
        ssh_to "$worker" ": follow; $(printf "$FOLLOW" "$NAME")" >"$part" 2>"$SCRATCH/follow.$worker" || true
        sed -n 's/^hypenet-exit-code=\([0-9]\)/\1/p' "$part" | tail -n 1 >"$SCRATCH/code.$worker"
        keep "$worker" "$1"
        [[ ! -s $SCRATCH/code.$worker ]] || break
        [[ $(resource_state) == ACTIVE ]] || break
        ((attempt == 3)) || sleep "$POLL"
      done
    ) &
    pids+=($!)
  done
  wait "${pids[@]}" || true
  CODES=()
  for ((worker = 0; worker < WORKERS; worker++)); do
    CODES+=("$(cat "$SCRATCH/code.$worker")")
    CODES[worker]=${CODES[worker]:-lost}
  done
}

# done, preempted or failed. A worker that fails because another was taken away counts as preempted, also where the
# resource tells it only some time after the workers are gone: then it is asked again, for two minutes.
outcome() {
  local look state
  [[ "${CODES[*]}" =~ ^0(\ 0)*$ ]] && echo 'done' && return
  [[ " ${CODES[*]} " == *" $EXIT_PREEMPTED "* ]] && echo preempted && return
  for ((look = 1; look <= 7; look++)); do
    state=$(resource_state) # by itself, so that a call that goes on failing ends the launcher
    [[ $state == ACTIVE ]] || { echo preempted && return; }
    [[ " ${CODES[*]} " =~ \ (lost|$EXIT_LOST|$EXIT_ABORTED)\  ]] || break
    ((look == 7)) || sleep "$POLL"
  done
  echo failed
}

explain_failure() {
  local worker code cause=''
  # A worker that lost another one is not the cause, unless nothing else is known.
  for code in "${CODES[@]}"; do
    case $code in 0 | "$EXIT_LOST" | "$EXIT_ABORTED") ;; *) cause=another ;; esac
  done
  for ((worker = 0; worker < WORKERS; worker++)); do
    case ${CODES[worker]} in
      0) ;;
      "$EXIT_LOST" | "$EXIT_ABORTED") [[ -n $cause ]] || lost_another "$worker" ;;
      lost) fail "worker $worker was lost while it ran; the same command continues, logs are in $LOGS" ;;
      *) fail "worker $worker ended with exit code ${CODES[worker]} (last words: $(grep -v '^hypenet-exit-code=' "$(cat "$SCRATCH/log.$worker")" | tail -n 1)); logs are in $LOGS, the resource stays, remove it with --down" ;;
    esac
  done
}

lost_another() {
  fail "worker $1 lost another worker, of which nothing is known; the same command continues, logs are in $LOGS"
}

# shellcheck disable=SC2059,SC2088
print_plan() {
  WORKERS=1
  local words
  words=$(printf '%q' "$(quoted "${COMMAND[@]}")")
  echo "# the resource (made where describe finds none), until its state is ACTIVE"
  queued describe '--format=value(state.state)'
  create 2>/dev/null
  run gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" '--format=value(state)'
  run gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" '--format=value(networkEndpoints.len())'
  echo "# each ssh below once for every worker, 0 first"
  ssh_to 0 ": check; $(printf "$PROBE" "$NAME")"
  run git -C "$ROOT" archive --format=tar.gz -o "hypenet-$NAME.tar.gz" "$COMMIT"
  ssh_to 0 ": mkdir; mkdir -p ~/hypenet-$NAME"
  run gcloud compute tpus tpu-vm scp "hypenet-$NAME.tar.gz" "$NAME:" "${WHERE[@]}" --worker=all --quiet
  ssh_to 0 ": install; $(printf "$INSTALL" "$NAME" "$NAME" "$COMMIT")"
  ((${#BUCKETS[@]} == 0)) || ssh_to 0 ": mount; $(printf "$MOUNT" "${BUCKETS[*]}")"
  ssh_to 0 ": start; $(printf "$START" "$NAME" "$words" "$words")"
  ssh_to 0 ": follow; $(printf "$FOLLOW" "$NAME")"
  echo "# after exit code 75 or a preemption: delete, create and the rest again"
  queued delete --force --quiet
}

main() {
  parse "$@"
  if ((DOWN)); then
    [[ $DRY_RUN == 1 ]] || scratch
    [[ $DRY_RUN == 1 || $(resource_state) != ABSENT ]] || { say "there is no '$NAME' in $ZONE" && exit 0; }
    delete
    exit 0
  fi
  choose_commit
  [[ $DRY_RUN == 0 ]] || { print_plan && exit 0; }
  scratch
  trap 'say "interrupted; the run goes on: the same command follows it, --down ends it"; jobs -p | xargs -r kill; exit 130' INT TERM
  local restarts=0 result
  while true; do
    ensure_active
    count_workers
    prepare
    mount_buckets
    start
    say "running on $WORKERS worker(s); logs come to $LOGS"
    follow "$restarts"
    result=$(outcome)
    case $result in
      'done') break ;;
      failed) explain_failure ;;
    esac
    ((restarts < RESTARTS)) || { say "preempted after $restarts restart(s); the same command continues" && exit "$EXIT_PREEMPTED"; }
    restarts=$((restarts + 1))
    say "preempted (exit codes ${CODES[*]}); restart $restarts of $RESTARTS"
  done
  say "done; logs are in $LOGS"
  if ((DELETE_AFTER)); then delete; else say "the resource stays and costs money; remove it with --down"; fi
}

scratch() {
  SCRATCH=$(mktemp -d)
  trap 'rm -rf "$SCRATCH"' EXIT
}

main "$@"
