#!/usr/bin/env bash
# A hypenet command as a Slurm job: one process a host, which JAX joins by Slurm's own environment.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

help() {
  cat <<'HELP'
usage: launch/slurm.sh --name NAME --nodes N [options] -- <hypenet command>

Write a batch script and submit it. The job is put back in the queue when it ends with exit code 75, and two minutes
before its time is over it is asked to save (SIGTERM). The environment has to be on a file system that all hosts see.

  --name NAME        the job
  --nodes N          hosts; each runs one process over all of its GPUs
  --gpus-per-node N  (default 8)
  --time LIMIT       Slurm's time limit (default 24:00:00)
  --partition NAME   --account NAME   as Slurm knows them
  --env DIR          the virtual environment (default .venv of this checkout)
  --logs DIR         where the output goes (default launch-logs/NAME)
  --wait             follow the queue until the job has left it, and end with its exit code
  --down             cancel the jobs of this name
  --dry-run          print the batch script and the command, submit nothing

exit codes: 0 submitted, 1 refused by Slurm, 2 a mistake in the input; with --wait the job's own, and 1 where Slurm
ended it before it could tell (a time limit, scancel, a lost host)

example:
  launch/slurm.sh --name halo-2b --nodes 2 -- distill --config configs/my_config.py --workdir /shared/halo-2b
HELP
}

NAME='' NODES='' GPUS=8 TIME=24:00:00 PARTITION='' ACCOUNT='' ENVIRONMENT=$ROOT/.venv LOGS='' WAIT=0 DOWN=0 DRY_RUN=0
COMMAND=()
while (($# > 0)); do
  case $1 in
    --name | --nodes | --gpus-per-node | --time | --partition | --account | --env | --logs)
      need_value "$1" $#
      case $1 in
        --name) NAME=$2 ;;
        --nodes) check_number "$1" "$2" 1 && NODES=$2 ;;
        --gpus-per-node) check_number "$1" "$2" && GPUS=$2 ;;
        --time) TIME=$2 ;;
        --partition) PARTITION=$2 ;;
        --account) ACCOUNT=$2 ;;
        --env) ENVIRONMENT=$2 ;;
        --logs) LOGS=$2 ;;
      esac
      shift 2
      ;;
    --wait) WAIT=1 && shift ;;
    --down) DOWN=1 && shift ;;
    --dry-run) DRY_RUN=1 && shift ;;
    --help | -h) help && exit 0 ;;
    --) shift && COMMAND=("$@") && break ;;
    *) usage_error "unknown argument '$1'; see --help" ;;
  esac
done
check_name "$NAME"
if ((DOWN)); then
  need_program scancel "log in to a host of the cluster"
  run scancel "--name=$NAME" --me
  exit 0
fi
check_command "${COMMAND[@]}"
[[ -n $NODES ]] || usage_error "the number of hosts is missing; give --nodes N"
[[ $TIME =~ ^([0-9]+-)?[0-9]+(:[0-9]{1,2}){0,2}$ ]] || usage_error "--time is '$TIME'; give Slurm's form, such as 24:00:00"
[[ $PARTITION$ACCOUNT =~ ^[A-Za-z0-9_.,-]*$ ]] || usage_error "the partition '$PARTITION' or the account '$ACCOUNT' is no name that Slurm knows"
# Slurm reads it in a comment of the script, where % begins a pattern.
[[ $LOGS != *[\"\\%[:cntrl:]]* ]] || usage_error "--logs is $(printf %q "$LOGS"); give a path without quotes, backslashes, % and line breaks"
[[ -n $ENVIRONMENT ]] || usage_error "--env is empty; give the directory of the virtual environment"
for word in "${COMMAND[@]}"; do
  ! names_bucket "$word" || usage_error "'$word' is in a bucket, which is not mounted here; give a path that all hosts see"
done
need_program sbatch "log in to a host of the cluster"
LOGS=${LOGS:-$PWD/launch-logs/$NAME}

batch_script() {
  cat <<BATCH
#!/usr/bin/env bash
#SBATCH --job-name=$NAME
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$GPUS
#SBATCH --exclusive
#SBATCH --time=$TIME
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --output="$LOGS/%j.log"
${PARTITION:+#SBATCH --partition=$PARTITION
}${ACCOUNT:+#SBATCH --account=$ACCOUNT
}
# The batch shell hears the signal, and passes it to every process.
trap 'scancel --signal=TERM "\$SLURM_JOB_ID.0"' TERM
srun --kill-on-bad-exit=0 --output=$(printf %q "$LOGS")/%j-%t.log $(printf %q "$ENVIRONMENT/bin/hypenet") $(quoted "${COMMAND[@]}") &
step=\$!
code=0
rm -f $(printf %q "$LOGS")/"\$SLURM_JOB_ID".code
wait "\$step" || code=\$?
while kill -0 "\$step" 2>/dev/null; do code=0; wait "\$step" || code=\$?; done
echo "\$code" >$(printf %q "$LOGS")/"\$SLURM_JOB_ID".code
if [ "\$code" = $EXIT_PREEMPTED ]; then scontrol requeue "\$SLURM_JOB_ID"; fi
exit "\$code"
BATCH
}

if [[ $DRY_RUN == 1 ]]; then
  run mkdir -p "$LOGS"
  batch_script | here_document "cat >$(quoted "$LOGS/$NAME.sbatch")"
  run sbatch --parsable "$LOGS/$NAME.sbatch"
  exit 0
fi
mkdir -p "$LOGS"
batch_script >"$LOGS/$NAME.sbatch"
job=$(sbatch --parsable "$LOGS/$NAME.sbatch") || fail "Slurm refused the job; its words are above, the script is $LOGS/$NAME.sbatch"
say "job $job; its output comes to $LOGS, cancel it with --down"
((WAIT)) || exit 0
while [[ -n $(squeue --noheader --jobs "$job" --format=%T 2>/dev/null) ]]; do sleep "${HYPENET_POLL_SECONDS:-20}"; done
# A multi-cluster Slurm adds ";cluster" to the number.
code=$(cat "$LOGS/${job%%;*}.code" 2>/dev/null) || fail "Slurm ended job $job before it could tell how it went; see $LOGS and 'sacct --jobs $job'"
say "job $job ended with exit code $code; its output is in $LOGS"
exit "$code"
