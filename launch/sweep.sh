#!/usr/bin/env bash
# One run per mesh of a list, through any of the other launchers.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

help() {
  cat <<'HELP'
usage: launch/sweep.sh --name NAME --meshes "SET ..." --through "SCRIPT OPTIONS" [--dry-run] -- <hypenet command>

Run the command once per mesh, one after another, each under its own name and work directory: @MESH@ in the command is
replaced by the mesh's own name. A run that fails does not stop the others; results.tsv has each one's exit code.

  --name NAME       the sweep; a run is NAME-1, NAME-2, ...
  --meshes LIST     one word a mesh: comma-separated values for --set, such as mesh.fsdp=8 mesh.fsdp=4,mesh.seq=2
  --through SCRIPT  gpu_local.sh, slurm.sh, gke.sh or tpu_pod.sh, with its options; tpu_pod.sh runs all on one resource,
                    which stays (--down removes it)
  --results DIR     (default launch-logs/NAME)
  --dry-run         pass --dry-run on

exit codes: 0 every run ended well, 1 some did not, 2 a mistake in the input

example:
  launch/sweep.sh --name mesh --meshes "mesh.fsdp=8 mesh.fsdp=4,mesh.seq=2" --through gpu_local.sh -- \
    distill --config configs/demo.py --workdir runs/@MESH@
HELP
}

NAME='' MESHES='' THROUGH='' RESULTS='' DRY_RUN=0 COMMAND=()
while (($# > 0)); do
  case $1 in
    --name | --meshes | --through | --results)
      need_value "$1" $#
      case $1 in
        --name) NAME=$2 ;;
        --meshes) MESHES=$2 ;;
        --through) THROUGH=$2 ;;
        --results) RESULTS=$2 ;;
      esac
      shift 2
      ;;
    --dry-run) DRY_RUN=1 && shift ;;
    --help | -h) help && exit 0 ;;
    --) shift && COMMAND=("$@") && break ;;
    *) usage_error "unknown argument '$1'; see --help" ;;
  esac
done
check_name "$NAME"
check_command "${COMMAND[@]}"
# All lines of it: read ends at the first otherwise, and says so with an error at the end of the text.
read -rd '' -a LIST <<<"$MESHES" || true
((${#LIST[@]} > 0)) || usage_error "there are no meshes; give --meshes \"mesh.fsdp=8 mesh.fsdp=4,mesh.seq=2\""
read -rd '' -a LAUNCHER <<<"$THROUGH" || true
case ${LAUNCHER[0]:-} in
  gpu_local.sh | slurm.sh | gke.sh | tpu_pod.sh) ;;
  *) usage_error "--through is '$THROUGH'; give gpu_local.sh, slurm.sh, gke.sh or tpu_pod.sh with its options" ;;
esac
for word in "${LAUNCHER[@]:1}"; do
  case $word in -- | --down | --help | -h | --name) usage_error "--through has $word, which the sweep cannot pass on; leave it out" ;; esac
done
# tpu_pod.sh runs all under the sweep's own name.
longest=$NAME-${#LIST[@]}
[[ ${LAUNCHER[0]} == tpu_pod.sh ]] || ((${#longest} <= MOST_NAME)) ||
  usage_error "the run's name '$longest' has more than $MOST_NAME characters; give a shorter --name"

check_workdir() { # the value of a --workdir
  [[ $1 == *@MESH@* ]] || usage_error "all runs would share the command's --workdir '$1', and go on with each other; put @MESH@ into it"
}

# Each of them, for hypenet takes the last, and any beginning of an option's name that no other option has.
follows=0
for word in "${COMMAND[@]}"; do
  if ((follows)); then
    check_workdir "$word" && follows=0
  elif [[ $word =~ ^--wo?r?k?d?i?r?$ && ${COMMAND[0]} != scaling ]]; then
    follows=1
  elif [[ $word =~ ^--wo?r?k?d?i?r?= ]]; then
    check_workdir "${word#*=}"
  fi
done
for mesh in "${LIST[@]}"; do
  [[ ,$mesh, != *,,* ]] || usage_error "the mesh '$mesh' has an empty value; give comma-separated values for --set"
done
RESULTS=${RESULTS:-launch-logs/$NAME}

# Sets JOB, and LINE to the launcher's command for it.
line_of() { # INDEX [--dry-run]
  local values value sets=()
  JOB=$NAME-$(($1 + 1))
  IFS=, read -ra values <<<"${LIST[$1]}"
  for value in "${values[@]}"; do sets+=(--set "$value"); done
  LINE=("$ROOT/launch/${LAUNCHER[0]}" "${LAUNCHER[@]:1}")
  case ${LAUNCHER[0]} in
    # One resource for all, not one that costs money for each.
    tpu_pod.sh) LINE+=(--name "$NAME" --logs "$RESULTS/$JOB") ;;
    # Slurm's launcher would otherwise be done as soon as the job is in the queue.
    slurm.sh) LINE+=(--name "$JOB" --wait) ;;
    *) LINE+=(--name "$JOB") ;;
  esac
  LINE+=("${@:2}" -- "${COMMAND[@]//@MESH@/$JOB}" "${sets[@]}")
}

# A mistake in the launcher's options would end every run alike.
line_of 0 --dry-run
"${LINE[@]}" >/dev/null || exit
if [[ $DRY_RUN == 1 ]]; then
  for index in "${!LIST[@]}"; do
    line_of "$index" --dry-run
    "${LINE[@]}"
  done
  exit 0
fi

mkdir -p "$RESULTS"
failed=0 rows=$'name\tmesh\texit_code\tseconds'
for index in "${!LIST[@]}"; do
  line_of "$index"
  say "'$JOB': ${LIST[index]}"
  start=$SECONDS code=0
  "${LINE[@]}" >"$RESULTS/$JOB.log" 2>&1 || code=$?
  [[ $code != 130 ]] || exit 130
  [[ $code == 0 ]] || { failed=1 && say "'$JOB' ended with exit code $code (last words: $(tail -n 1 "$RESULTS/$JOB.log"))"; }
  rows+=$'\n'"$JOB"$'\t'"${LIST[index]}"$'\t'"$code"$'\t'"$((SECONDS - start))"
  printf '%s\n' "$rows" >"$RESULTS/results.tsv.tmp"
  mv "$RESULTS/results.tsv.tmp" "$RESULTS/results.tsv"
done
say "the results are in $RESULTS/results.tsv"
exit "$failed"
