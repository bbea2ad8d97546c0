#!/usr/bin/env bash
# A hypenet command in one process over all GPUs of this host, started again while it ends as preempted.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

help() {
  cat <<'HELP'
usage: launch/gpu_local.sh [options] -- <hypenet command>

Run the command in one process that sees every GPU of this host; exit code 75 (preempted, state saved) starts it again.

  --name NAME     the job's name, for messages (default local)
  --restarts N    times that it is started again (default 20)
  --gpus LIST     only these GPUs, such as 0,1
  --hypenet PATH  the program (default hypenet, from PATH)
  --dry-run       print the command, do not run it

exit codes: those of hypenet; 75 when it was preempted once too often

example:
  launch/gpu_local.sh -- distill --config configs/demo.py --workdir runs/demo
HELP
}

NAME=local RESTARTS=20 GPUS='' HYPENET=hypenet DRY_RUN=0 COMMAND=()
while (($# > 0)); do
  case $1 in
    --name | --restarts | --gpus | --hypenet)
      need_value "$1" $#
      case $1 in
        --name) NAME=$2 ;;
        --restarts) check_number "$1" "$2" && RESTARTS=$2 ;;
        --gpus) GPUS=$2 ;;
        --hypenet) HYPENET=$2 ;;
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
[[ -z $GPUS || $GPUS =~ ^[0-9]+(,[0-9]+)*$ ]] || usage_error "--gpus is '$GPUS'; give numbers with commas, such as 0,1"
[[ -n $HYPENET ]] || usage_error "--hypenet is empty; give the program's path"
need_program "$HYPENET" "activate its environment, or give --hypenet"

LINE=()
[[ -z $GPUS ]] || LINE=(env "CUDA_VISIBLE_DEVICES=$GPUS")
LINE+=("$HYPENET" "${COMMAND[@]}")
[[ $DRY_RUN == 0 ]] || { run "${LINE[@]}" && exit 0; }

# The process has to hear of a SIGTERM to the launcher, and is not started again after it.
stopped=0 child=''
trap 'stopped=1; [[ -z $child ]] || kill -TERM "$child"' TERM INT
for ((attempt = 0; ; attempt++)); do
  "${LINE[@]}" &
  child=$!
  code=0
  wait "$child" || code=$?
  # A signal ends the wait before the process has saved.
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  if [[ $code != "$EXIT_PREEMPTED" || $stopped == 1 ]]; then exit "$code"; fi
  ((attempt < RESTARTS)) || { say "'$NAME' was preempted after $attempt restart(s); the same command continues" && exit "$code"; }
  say "'$NAME' was preempted; restart $((attempt + 1)) of $RESTARTS"
done
