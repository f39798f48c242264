#!/usr/bin/env bash
# Runs a command as several processes on this machine, each with CPU devices of its own, for trying what pods do.
#
#   launch/local.sh [-n PROCESSES] [-d DEVICES_EACH] [--max-restarts N] [--dry-run] -- python -m diffdis_jax.train ...
#
# It starts all of them again when one is preempted (SIGTERM) or dies. SIGTERM to this script stops them for good, saved.
set -euo pipefail
# shellcheck source=launch/supervise.sh
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"

processes=2 devices=4 dry_run=
while (($#)); do
  case $1 in
    -n) processes=$2 && shift 2 ;;
    -d) devices=$2 && shift 2 ;;
    --max-restarts) MAX_RESTARTS=$2 && shift 2 ;;
    --dry-run) dry_run=1 && shift ;;
    --) shift && break ;;
    *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
  esac
done
(($#)) || { echo "error: no command; give it after --" >&2 && exit 2; }

GRACE=20 # seconds for the others to end by themselves, and to show their errors, once one has
pids=()
workdir=$(workdir_of "$@")
progress() { newest_step "$workdir"; }

stop() {
  STOPPING=1
  kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap stop TERM INT

settings() { # of process $1, with the coordinator's port $2
  echo "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices DIFFDIS_COORDINATOR_ADDRESS=localhost:$2" \
    "DIFFDIS_NUM_PROCESSES=$processes DIFFDIS_PROCESS_ID=$1"
}

attempt() {
  local port=$((20000 + RANDOM % 10000)) first=0 deadline=0 code i pid left
  pids=()
  for ((i = 0; i < processes; i++)); do
    # shellcheck disable=SC2046  # several settings
    env $(settings "$i" "$port") "$@" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
    pids+=($!)
  done
  while ((${#pids[@]})); do
    left=()
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then left+=("$pid") && continue; fi
      code=0
      wait "$pid" || code=$?
      ((first)) || first=$code
    done
    pids=("${left[@]}")
    ((first == 0 || deadline)) || deadline=$((SECONDS + GRACE))
    ((deadline == 0 || SECONDS < deadline)) || kill -KILL "${pids[@]}" 2>/dev/null || true
    sleep 0.2
  done
  return "$first"
}

if [[ $dry_run ]]; then
  for ((i = 0; i < processes; i++)); do echo "env $(settings "$i" PORT) $*"; done
  exit
fi
supervise progress attempt "$@"
