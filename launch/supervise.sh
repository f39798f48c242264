# shellcheck shell=bash
# The launchers source this file. It has one way to refuse a command line, and one rule for each exit code.
#
#   0    finished                    75, 143   preempted, 143 before there was anything to save: start it again
#   2    bad input: never again      130       interrupted by Ctrl-C: never again
#   anything else                    a crash or a dead host: start it again, unless it makes no progress

MAX_RESTARTS=${MAX_RESTARTS:-3} # restarts after crashes without a new checkpoint between them
PREEMPTED=75
TERMINATED=143
BAD_INPUT=2
INTERRUPTED=130

# The share of a GPU's memory that JAX may take. Preflight assumes it (docs/preflight.md); JAX's own default is 0.75.
# JAX refuses its older and its newer variable together.
if [[ ! ${XLA_CLIENT_MEM_FRACTION:-}${XLA_PYTHON_CLIENT_MEM_FRACTION:-} ]]; then
  export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
fi
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1} # huge pages, if the kernel lets programs ask for them

note() { echo "$(basename "$0"): $*" >&2; }
refuse() { note "error: $*" && exit "$BAD_INPUT"; }

# This check comes before anything that an older bash lacks: macOS has 3.2. RHEL 8 has 4.4, which lacks EPOCHSECONDS.
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  refuse "bash 4.4 or newer is needed, and this is $BASH_VERSION; on a Mac: brew install bash"
fi

# help prints the comment at the top of the script.
help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# is_meant CODE: succeed if a run chose this exit code itself. Its other processes may then fail with any code.
is_meant() { (($1 == BAD_INPUT || $1 == INTERRUPTED || $1 == PREEMPTED)); }

# refuse_unless_number NAME VALUE LEAST
refuse_unless_number() {
  if ! [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || (($2 < $3)); then refuse "$1 is '$2'; it should be a whole number from $3 up"; fi
}

case ${ENV:=} in */*) ENV='' ;; esac # with a slash it is a shell's own variable, its start file

# refuse_unless_set ENV: refuse if one of these variables, whose names are separated by commas, has no value.
refuse_unless_set() {
  local name
  for name in ${1//,/ }; do
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] ||
      refuse "ENV is '$1'; it should be names of variables, such as WANDB_API_KEY,HF_TOKEN"
    [[ ${!name:-} ]] || refuse "ENV names $name, which is not set; export it first"
  done
}

# call COMMAND...: run it, or print it with --dry-run ($dry_run).
call() { if [[ ${dry_run:-} ]]; then printf '%q ' "$@" && echo; else "$@"; fi; }

# pause SECONDS: sleep, but not through a trapped signal.
pause() {
  sleep "$1" &
  wait $! || true
}

# Print the value of --workdir in a command, or nothing. For `ablate run` it is the workdir of $ABLATION_RUN, or else a
# pattern of all.
workdir_of() {
  local name=workdir runs=''
  case " $* " in *" ablate run "* | *.ablate" run "*) name=out runs="/runs/${ABLATION_RUN:-*}" ;; esac
  while (($#)); do
    case $1 in
      --"$name="* | -"$name="*) printf '%s%s\n' "${1#*=}" "$runs" && return ;;
      --"$name" | -"$name") printf '%s%s\n' "${2:-}" "$runs" && return ;;
    esac
    shift
  done
}

# Print the Python that a command starts with, or else the machine's.
python_of() { case $(basename "${1:-}") in python*) echo "$1" ;; *) echo python3 ;; esac; }

# Print the newest committed step in $workdir: the sum if several folders fit, 0 if it cannot be seen from here. A
# bucket is read by gcloud or, if that is missing, by $python with this package.
newest_step() {
  local steps='' marks
  workdir=${workdir:-} marks="${workdir%/}/checkpoints/*/commit_success.txt"
  if [[ ! ${dry_run:-} ]]; then
    case $workdir in
      gs://*)
        if command -v gcloud >/dev/null; then
          steps=$(gcloud storage ls "$marks" 2>/dev/null) || true
        else
          steps=$("${python:-python3}" -m diffdis_jax.run.workdir "$workdir" 2>/dev/null) || true
        fi
        ;;
      ?*) steps=$(compgen -G "$marks") || true ;;
    esac
  fi
  awk -F/ 'NF > 3 && $(NF - 1) ~ /^[0-9]+$/ && $(NF - 1) > newest[$(NF - 3)] { newest[$(NF - 3)] = $(NF - 1) + 0 }
    END { for (run in newest) sum += newest[run]; print sum + 0 }' <<<"$steps"
}

# supervise DELAY PROGRESS ATTEMPT...: run ATTEMPT until it is done or $stopping is set, DELAY seconds apart. PROGRESS
# prints a step; $MAX_RESTARTS limits the crashes since that step last grew.
supervise() {
  local delay=$1 progress=$2 crashes=0 code reached now
  shift 2
  refuse_unless_number MAX_RESTARTS "$MAX_RESTARTS" 0
  reached=$("$progress")
  while true; do
    code=0
    "$@" || code=$?
    if ((code == 0 || code == BAD_INPUT || code == INTERRUPTED)) || [[ ${stopping:-} ]]; then return "$code"; fi
    now=$("$progress")
    if ((now > reached)); then reached=$now crashes=0; fi
    if ((code == PREEMPTED || code == TERMINATED)); then
      note "preempted; starting again"
    elif ((crashes >= MAX_RESTARTS)); then
      note "ended with code $code, and $MAX_RESTARTS restarts brought no new checkpoint; giving up"
      return "$code"
    else
      crashes=$((crashes + 1))
      note "ended with code $code; starting again ($crashes of $MAX_RESTARTS without a new checkpoint)"
    fi
    pause "$delay"
    if [[ ${stopping:-} ]]; then return "$code"; fi
  done
}
