#!/usr/bin/env bash
# A hypenet command as a JobSet on GKE: one pod a host of a TPU slice.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

help() {
  cat <<'HELP'
usage: launch/gke.sh --name NAME --image IMAGE --accelerator NAME --topology T [options] -- <hypenet command>
       launch/gke.sh --name NAME --down

Render launch/gke.yaml, apply it with kubectl and follow it. Kubernetes starts all pods again when one is preempted or
ends with exit code 75; the command continues in its work directory, which has to be in a bucket: gs://BUCKET/FOLDER is
mounted in every pod by the cluster's Cloud Storage FUSE driver.

  --name NAME              the JobSet
  --image IMAGE            built from the Dockerfile and pushed to a registry that the cluster reads
  --accelerator NAME       node label, such as tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
  --topology T             such as 4x4 or 2x2x4
  --chips-per-host N       (default 4)
  --service-account NAME   Kubernetes service account that may write to the bucket (default default)
  --namespace NAME         (default default)
  --restarts N             (default 20)
  --timeout SECONDS        how long to wait for pods that do not run, at the start and after a restart (default 7200)
  --down                   delete the JobSet
  --dry-run                print the manifest and every command, run none

exit codes: 0 done, 1 failed, 2 a mistake in the input

example:
  launch/gke.sh --name halo-2b --image us-docker.pkg.dev/p/r/hypenet:1 --accelerator tpu-v5-lite-podslice \
    --topology 4x4 -- distill --config configs/my_config.py --workdir gs://my-bucket/halo-2b
HELP
}

NAME='' IMAGE='' ACCELERATOR='' TOPOLOGY='' CHIPS=4 SERVICE_ACCOUNT=default NAMESPACE=default RESTARTS=20
TIMEOUT=7200 DOWN=0 DRY_RUN=0 COMMAND=()
# RESTARTS is read by name, where the template is filled in.
export RESTARTS
while (($# > 0)); do
  case $1 in
    --name | --image | --accelerator | --topology | --chips-per-host | --service-account | --namespace | --restarts | --timeout)
      need_value "$1" $#
      case $1 in
        --name) NAME=$2 ;;
        --image) IMAGE=$2 ;;
        --accelerator) ACCELERATOR=$2 ;;
        --topology) TOPOLOGY=$2 ;;
        --chips-per-host) check_number "$1" "$2" 1 && CHIPS=$2 ;;
        --service-account) SERVICE_ACCOUNT=$2 ;;
        --namespace) NAMESPACE=$2 ;;
        --restarts) check_number "$1" "$2" && RESTARTS=$2 ;;
        --timeout) check_number "$1" "$2" && TIMEOUT=$2 ;;
      esac
      shift 2
      ;;
    --down) DOWN=1 && shift ;;
    --dry-run) DRY_RUN=1 && shift ;;
    --help | -h) help && exit 0 ;;
    --) shift && COMMAND=("$@") && break ;;
    *) usage_error "unknown argument '$1'; see --help" ;;
  esac
done
check_name "$NAME"
[[ $NAMESPACE =~ ^[a-z0-9]([a-z0-9-]*[a-z0-9])?$ ]] || usage_error "the namespace is '$NAMESPACE'; give a Kubernetes name, such as default"
KUBECTL=(kubectl "--namespace=$NAMESPACE")
PODS=--selector=jobset.sigs.k8s.io/jobset-name=$NAME
# Of the one job, `ready` is 1 where all its pods run or have ended well.
STATUS='--output=jsonpath={.status.restarts}/{.status.terminalState}/{.status.replicatedJobsStatus[*].ready}'
need_program kubectl "install it and connect it to the cluster"
if ((DOWN)); then
  run "${KUBECTL[@]}" delete jobset "$NAME" --ignore-not-found
  exit 0
fi
check_command "${COMMAND[@]}"
mount_buckets_of_command
((${#BUCKETS[@]} <= 1)) || usage_error "the command names the buckets ${BUCKETS[*]}; use one"
[[ $IMAGE =~ ^[A-Za-z0-9._/:@-]+$ ]] || usage_error "the image is '$IMAGE'; give --image, such as us-docker.pkg.dev/p/r/hypenet:1"
[[ $ACCELERATOR =~ ^[a-z0-9-]+$ ]] || usage_error "the accelerator is '$ACCELERATOR'; give --accelerator, such as tpu-v5p-slice"
[[ $TOPOLOGY =~ ^[1-9][0-9]{0,3}x[1-9][0-9]{0,3}(x[1-9][0-9]{0,3})?$ ]] || usage_error "the topology is '$TOPOLOGY'; give --topology, such as 4x4"
[[ $SERVICE_ACCOUNT =~ ^[a-z0-9.-]+$ ]] || usage_error "the service account '$SERVICE_ACCOUNT' is no Kubernetes name"
HOSTS=$((${TOPOLOGY//x/*} / CHIPS))
((HOSTS >= 1 && HOSTS * CHIPS == ${TOPOLOGY//x/*})) || usage_error "$TOPOLOGY does not divide into hosts of $CHIPS chips; give --chips-per-host"

# A word as a YAML string from which Kubernetes makes that word: it reads $(NAME) as a variable, and $$ as a dollar.
yaml_word() {
  local word=$1
  word=${word//\\/\\\\}
  word=${word//\"/\\\"}
  word=${word//$'\n'/\\n}
  word=${word//$'\t'/\\t}
  word=${word//$'\r'/\\r}
  printf '"%s"' "${word//\$/\$\$}"
}

ARGUMENTS='' BUCKET=${BUCKETS[0]:-} MOUNT=$BUCKET_ROOT/${BUCKETS[0]:-}
export BUCKET MOUNT
for word in "${COMMAND[@]}"; do
  [[ ${word//[$'\n\t\r']/} != *[[:cntrl:]]* ]] || usage_error "the word $(printf %q "$word") has a control character; leave it out"
  ARGUMENTS+="${ARGUMENTS:+, }$(yaml_word "$word")"
done

# The template with its words between at signs replaced, once: what takes their places is not looked at again.
render() {
  local rest filled=''
  # The lines of a bucket are comments, which go where there is none.
  if [[ -n $BUCKET ]]; then
    rest=$(sed 's/# bucket: //' "$ROOT/launch/gke.yaml")
  else
    rest=$(sed '/# bucket: /d' "$ROOT/launch/gke.yaml")
  fi
  while [[ $rest =~ @([A-Z_]+)@ ]]; do
    filled+=${rest%%"${BASH_REMATCH[0]}"*}${!BASH_REMATCH[1]}
    rest=${rest#*"${BASH_REMATCH[0]}"}
  done
  printf '%s\n' "$filled$rest"
}

if [[ $DRY_RUN == 1 ]]; then
  render | here_document "$(quoted "${KUBECTL[@]}" apply --filename=-)"
  run "${KUBECTL[@]}" get jobset "$NAME" "$STATUS"
  run "${KUBECTL[@]}" logs "$PODS" --prefix --tail=-1
  exit 0
fi
render | "${KUBECTL[@]}" apply --filename=- || fail "kubectl could not apply '$NAME'; its words are above, remove what there is with --down"
say "'$NAME' is applied on $HOSTS host(s); this follows it and may be interrupted, --down ends the run"
LOGS=launch-logs/$NAME
mkdir -p "$LOGS"

# What the pods have said so far. Pods that are started again begin anew, so every restart has a file of its own.
gather() { # RESTARTS
  if "${KUBECTL[@]}" logs "$PODS" --prefix --tail=-1 --max-log-requests=1000 \
    >"$LOGS/pods.tmp" 2>"$LOGS/kubectl.err" && [[ -s $LOGS/pods.tmp ]]; then
    mv "$LOGS/pods.tmp" "$LOGS/pods-${1:-0}.log"
  fi
}

# The pods have not all come to run: the last warning among the events of one, or of the JobSet where there is none.
not_running() {
  local pods what=(jobset "$NAME") event
  pods=$("${KUBECTL[@]}" get pods "$PODS" --field-selector=status.phase=Pending '--output=jsonpath={.items[*].metadata.name}') || pods=''
  [[ -z $pods ]] || what=(pod "${pods%% *}")
  event=$("${KUBECTL[@]}" describe "${what[@]}" | sed -n '/^Events:/,$p' | grep ' Warning ' | tail -n 1 | tr -s '[:space:]' ' ') || true
  event=${event# }
  fail "'$NAME' is not running on all hosts after $TIMEOUT s (${what[*]}: ${event:-no warning among its events}); wait longer (--timeout) or give the cluster what it lacks; the JobSet stays, remove it with --down"
}

errors=0 restarts=0 ready=0 since=$SECONDS
while true; do
  if status=$("${KUBECTL[@]}" get jobset "$NAME" "$STATUS"); then
    errors=0
    IFS=/ read -r count state ready <<<"$status"
    if [[ $count =~ ^[0-9]+$ && $count != "$restarts" ]]; then
      restarts=$count && say "'$NAME' was started again ($restarts of $RESTARTS)"
    fi
    [[ ${ready:=0} == 0 ]] || since=$SECONDS
  else
    state='' errors=$((errors + 1))
    ((errors < 5)) || fail "kubectl no longer finds '$NAME'; see 'kubectl get jobset'"
  fi
  gather "$restarts"
  [[ -z $state ]] || break
  [[ $ready != 0 ]] || ((SECONDS - since < TIMEOUT)) || not_running
  sleep "${HYPENET_POLL_SECONDS:-20}"
done
[[ -s $LOGS/pods-$restarts.log ]] || say "the logs of '$NAME' could not be read ($(tail -n 1 "$LOGS/kubectl.err"))"
rm -f "$LOGS/pods.tmp" "$LOGS/kubectl.err"
[[ $state == Completed ]] || fail "'$NAME' ended as $state; see $LOGS/pods-$restarts.log, remove it with --down"
say "done; logs are in launch-logs/$NAME, remove the JobSet with --down"
