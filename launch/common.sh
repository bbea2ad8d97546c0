# shellcheck shell=bash
# What every launcher shares: sourced, never run. The launcher sets DRY_RUN before it calls run.

shopt -s inherit_errexit
EXIT_USAGE=2
EXIT_PREEMPTED=75
# Another process was lost: hypenet's own word, and how a shell writes the SIGABRT with which JAX ends a process then.
EXIT_LOST=76
EXIT_ABORTED=134

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ROOT EXIT_USAGE EXIT_PREEMPTED EXIT_LOST EXIT_ABORTED

# One sentence on standard error and exit code 2: a mistake that the user can mend.
usage_error() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit "$EXIT_USAGE"
}

# One sentence on standard error and exit code 1: something failed that is not the user's doing.
fail() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit 1
}

say() { printf '%s\n' "$*" >&2; }

need_program() {
  [[ $DRY_RUN == 1 ]] || command -v "$1" >/dev/null || usage_error "$1 is not on PATH; $2"
}

need_value() { # OPTION REMAINING_ARGUMENTS
  (($2 >= 2)) || usage_error "$1 needs a value; see --help"
}

MOST_NAME=40
export MOST_NAME
check_name() {
  [[ -n $1 ]] || usage_error "the job has no name; give --name NAME"
  [[ $1 =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ && ${#1} -le $MOST_NAME ]] ||
    usage_error "the name '$1' is none that clusters take; use up to $MOST_NAME of a-z, 0-9 and -, a letter first"
}

check_number() { # OPTION VALUE [LEAST]
  if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < ${3:-0})); then
    usage_error "$1 is '$2'; give a whole number${3:+ of at least $3}"
  fi
}

check_command() { # the hypenet command after --
  (($# > 0)) || usage_error "there is no hypenet command; put it after --, as in: -- distill --config C --workdir W"
  [[ $1 != hypenet ]] || usage_error "the command begins with hypenet's own name; leave out 'hypenet'"
  [[ $1 =~ ^[a-z][a-z-]*$ ]] || usage_error "'$1' is no hypenet command; put one first, as in: -- distill --config C --workdir W"
}

# Files are appended to and renamed, which buckets do not know: each gs://BUCKET/... among the words of COMMAND, also as
# the value of OPTION=gs://... and between the quotes of OPTION=["gs://...", ...], becomes a path under BUCKET_ROOT, where
# the launcher mounts the BUCKETS with gcsfuse.
BUCKET_ROOT=/mnt/buckets BUCKETS=()
export BUCKET_ROOT

names_bucket() { # WORD
  [[ $1 =~ ^([A-Za-z0-9_.-]+=)*gs:// ]] || names_buckets_in_list "$1"
}

names_buckets_in_list() { [[ $1 =~ ^([A-Za-z0-9_.-]+=)+[\(\[].*gs:// ]]; }

mount_buckets_of_command() {
  local index rest head path bucket
  for index in "${!COMMAND[@]}"; do
    rest=${COMMAND[index]} head=''
    names_bucket "$rest" || continue
    while [[ $rest == *gs://* ]]; do
      path=gs://${rest#*gs://}
      ! names_buckets_in_list "${COMMAND[index]}" || path=${path%%[\"\']*}
      [[ $path =~ ^gs://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])/(.+)$ ]] ||
        usage_error "'$path' is no path in a bucket; give gs://BUCKET/FOLDER"
      bucket=${BASH_REMATCH[1]}
      head+=${rest%%gs://*}$BUCKET_ROOT/$bucket/${BASH_REMATCH[2]}
      rest=${rest#*"$path"}
      [[ " ${BUCKETS[*]} " == *" $bucket "* ]] || BUCKETS+=("$bucket")
    done
    COMMAND[index]=$head$rest
  done
}

# A command as one line that a shell reads back as the same words.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# What a dry run prints of a text that goes to a command or a file: pasted into a shell, it does just that.
here_document() { # COMMAND_WORDS... <TEXT
  printf "%s <<'END_OF_TEXT'\n" "$*"
  cat
  printf 'END_OF_TEXT\n'
}

# Run a command, or only print it.
run() {
  if [[ $DRY_RUN == 1 ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}
