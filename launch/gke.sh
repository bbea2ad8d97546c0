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
ends with exit code 75; the command continues in its work directory, which has to be in a bucket.

  --name NAME              the JobSet
  --image IMAGE            built from the Dockerfile and pushed to a registry that the cluster reads
  --accelerator NAME       node label, such as tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
  --topology T             such as 4x4 or 2x2x4
  --chips-per-host N       (default 4)
  --service-account NAME   Kubernetes service account that may write to the bucket (default default)
  --namespace NAME         (default default)
  --restarts N             (default 20)
  --down                   delete the JobSet
  --dry-run                print the manifest and every command, run none

exit codes: 0 done, 1 failed, 2 a mistake in the input

example:
  launch/gke.sh --name halo-2b --image us-docker.pkg.dev/p/r/hypenet:1 --accelerator tpu-v5-lite-podslice \
    --topology 4x4 -- distill --config configs/my_config.py --workdir /mnt/bucket/halo-2b
HELP
}

NAME='' IMAGE='' ACCELERATOR='' TOPOLOGY='' CHIPS=4 SERVICE_ACCOUNT=default NAMESPACE=default RESTARTS=20 DOWN=0
DRY_RUN=0 COMMAND=()
# RESTARTS is read by name, where the template is filled in.
export RESTARTS
while (($# > 0)); do
  case $1 in
    --name | --image | --accelerator | --topology | --chips-per-host | --service-account | --namespace | --restarts)
      need_value "$1" $#
      case $1 in
        --name) NAME=$2 ;;
        --image) IMAGE=$2 ;;
        --accelerator) ACCELERATOR=$2 ;;
        --topology) TOPOLOGY=$2 ;;
        --chips-per-host) check_number "$1" "$2" && CHIPS=$2 ;;
        --service-account) SERVICE_ACCOUNT=$2 ;;
        --namespace) NAMESPACE=$2 ;;
        --restarts) check_number "$1" "$2" && RESTARTS=$2 ;;
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
KUBECTL=(kubectl "--namespace=$NAMESPACE")
need_program kubectl "install it and connect it to the cluster"
if ((DOWN)); then
  run "${KUBECTL[@]}" delete jobset "$NAME" --ignore-not-found
  exit 0
fi
check_command "${COMMAND[@]}"
[[ $IMAGE =~ ^[A-Za-z0-9._/:@-]+$ ]] || usage_error "the image is '$IMAGE'; give --image, such as us-docker.pkg.dev/p/r/hypenet:1"
[[ $ACCELERATOR =~ ^[a-z0-9-]+$ ]] || usage_error "the accelerator is '$ACCELERATOR'; give --accelerator, such as tpu-v5p-slice"
[[ $TOPOLOGY =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] || usage_error "the topology is '$TOPOLOGY'; give --topology, such as 4x4"
[[ $SERVICE_ACCOUNT =~ ^[a-z0-9.-]+$ ]] || usage_error "the service account '$SERVICE_ACCOUNT' is no Kubernetes name"
HOSTS=$((${TOPOLOGY//x/*} / CHIPS))
((HOSTS >= 1 && HOSTS * CHIPS == ${TOPOLOGY//x/*})) || usage_error "$TOPOLOGY does not divide into hosts of $CHIPS chips; give --chips-per-host"

render() {
  local text arguments='' word
  for word in "${COMMAND[@]}"; do
    word=${word//\\/\\\\}
    arguments+="${arguments:+, }\"${word//\"/\\\"}\""
  done
  text=$(<"$ROOT/launch/gke.yaml")
  local key
  for key in NAME IMAGE ACCELERATOR TOPOLOGY CHIPS HOSTS SERVICE_ACCOUNT RESTARTS; do
    text=${text//"@$key@"/"${!key}"}
  done
  printf '%s\n' "${text//"@ARGUMENTS@"/"$arguments"}"
}

if [[ $DRY_RUN == 1 ]]; then
  render
  run "${KUBECTL[@]}" apply --filename=-
  run "${KUBECTL[@]}" get jobset "$NAME" '--output=jsonpath={.status.terminalState}'
  run "${KUBECTL[@]}" logs --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --prefix --tail=-1
  exit 0
fi
render | "${KUBECTL[@]}" apply --filename=- || fail "kubectl could not apply '$NAME'; its words are above, remove what there is with --down"
say "'$NAME' is applied on $HOSTS host(s); this follows it and may be interrupted, --down ends the run"
errors=0
while true; do
  if state=$("${KUBECTL[@]}" get jobset "$NAME" '--output=jsonpath={.status.terminalState}'); then
    errors=0
  else
    state='' errors=$((errors + 1))
    ((errors < 5)) || fail "kubectl no longer finds '$NAME'; see 'kubectl get jobset'"
  fi
  [[ -z $state ]] || break
  sleep "${HYPENET_POLL_SECONDS:-20}"
done
mkdir -p "launch-logs/$NAME"
"${KUBECTL[@]}" logs --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --prefix --tail=-1 --max-log-requests=1000 \
  >"launch-logs/$NAME/pods.log" || say "the logs of '$NAME' could not be read"
[[ $state == Completed ]] || fail "'$NAME' ended as $state; see launch-logs/$NAME/pods.log, remove it with --down"
say "done; logs are in launch-logs/$NAME, remove the JobSet with --down"
