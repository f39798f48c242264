# shellcheck shell=bash
# Sourced by the launchers. It starts a command again until it is done:
#
#   0    done                        2  bad input: starting it again would not help
#   75   preempted, and saved        anything else: a host died, or a bug
#
# After $MAX_RESTARTS failures without a new checkpoint in between it gives up; preemptions do not count.

MAX_RESTARTS=${MAX_RESTARTS:-3}

note() { echo "$(date +%T) $(basename "$0"): $*" >&2; }

# The value of --workdir in a command, or nothing.
workdir_of() {
  while (($#)); do
    case $1 in
      --workdir=* | -workdir=*) echo "${1#*=}" && return ;;
      --workdir | -workdir) echo "${2:-}" && return ;;
    esac
    shift
  done
}

# The newest step saved in a local workdir, or nothing.
newest_step() {
  local step
  for step in "$1"/checkpoints/*/commit_success.txt; do
    if [[ -e $step ]]; then basename "$(dirname "$step")"; fi
  done | sort -n | tail -n 1
}

# supervise PROGRESS ATTEMPT...: runs ATTEMPT until it is done. PROGRESS prints something that changes with each save.
supervise() {
  local progress=$1 failures=0 before code
  shift
  while true; do
    before=$($progress)
    code=0
    "$@" || code=$?
    if ((code == 0 || code == 2)) || [[ ${STOPPING:-} ]]; then return "$code"; fi
    if ((code == 75)); then
      note "preempted; starting again"
    else
      if [[ $($progress) != "$before" ]]; then failures=0; fi
      failures=$((failures + 1))
      if ((failures > MAX_RESTARTS)); then
        note "ended with code $code, $failures times without a new checkpoint; giving up"
        return "$code"
      fi
      note "ended with code $code; starting again"
    fi
  done
}
