#!/usr/bin/env bash
# Run a command as several processes on this machine, on CPU devices, to rehearse a pod.
#
#   launch/local.sh -n 2 -d 4 -- python -m diffdis_jax.train --config=... --workdir=...
#
#   -n N             processes
#   -d DEVICES       CPU devices of each process; 1
#   --restarts R     restarts after crashes without a new checkpoint between them; 3. Also --max-restarts
#   --dry-run        print the commands
#
# When one process fails, the others are stopped and all are started again. After code 2, bad input, or 130, Ctrl-C to a
# process, they are not. SIGTERM or Ctrl-C to this script is passed to all, so that they save, and nothing is started
# again; a second one kills them.
set -euo pipefail
# shellcheck source=launch/supervise.sh
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"

GRACE=${GRACE:-20} # seconds after the first failure, in which the others may save or report their errors
processes='' devices=1 dry_run='' stopping='' pids=()

while (($#)); do
  case $1 in
    -n | -d | --restarts | --max-restarts)
      (($# > 1)) || refuse "$1 needs a value"
      case $1 in -n) processes=$2 ;; -d) devices=$2 ;; *) MAX_RESTARTS=$2 ;; esac
      shift 2
      ;;
    --dry-run) dry_run=1 && shift ;;
    --help | -h) help && exit ;;
    --) shift && break ;;
    *) refuse "unknown argument '$1'; the command goes after --, and --help tells the rest" ;;
  esac
done
[[ $processes ]] || refuse "-n is missing: how many processes?"
refuse_unless_number -n "$processes" 1
refuse_unless_number -d "$devices" 1
refuse_unless_number --restarts "$MAX_RESTARTS" 0
(($#)) || refuse "no command; give it after --"

workdir=$(workdir_of "$@")
python=$(python_of "$@")

free_port() {
  local port
  while port=$((20000 + RANDOM % 10000)) && (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

# environment_of INDEX PORT
environment_of() {
  printf '%s\n' JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" DIFFDIS_LAUNCHED=1 \
    "DIFFDIS_COORDINATOR_ADDRESS=127.0.0.1:$2" "DIFFDIS_NUM_PROCESSES=$processes" "DIFFDIS_PROCESS_ID=$1"
}

signal_all() { # signal_all SIGNAL; each process leads a group, and SIGKILL also ends the workers in it
  local pid target=
  [[ $1 != KILL ]] || target=-
  for pid in "${pids[@]}"; do kill "-$1" -- "$target$pid" 2>/dev/null || true; done
}

stop() {
  if [[ $stopping ]]; then signal_all KILL; else signal_all TERM; fi
  stopping=1
}

# The code is that of the first process to fail. If several fail at once, 2, 130 or 75 goes before other codes.
attempt() {
  local port index code first=0 deadline='' variables
  port=$(free_port)
  set -m
  for ((index = 0; index < processes; index++)); do
    mapfile -t variables < <(environment_of "$index" "$port")
    env "${variables[@]}" "$@" </dev/null > >(sed -u "s/^/[$index] /") 2> >(sed -u "s/^/[$index] /" >&2) &
    pids[index]=$!
  done
  set +m
  if [[ $stopping ]]; then signal_all TERM; fi
  while ((${#pids[@]})); do
    for index in "${!pids[@]}"; do
      if kill -0 "${pids[index]}" 2>/dev/null; then continue; fi
      code=0
      wait "${pids[index]}" 2>/dev/null || code=$?
      if ((code)); then
        note "process $index ended with code $code"
        kill -KILL -- "-${pids[index]}" 2>/dev/null || true # workers that it left
        if ((!first)) || { [[ ! $deadline ]] && is_meant "$code"; }; then first=$code; fi
      fi
      unset "pids[$index]"
    done
    if ((first)) && [[ ! $deadline ]]; then
      deadline=$((SECONDS + GRACE))
      signal_all TERM
    elif [[ $deadline ]] && ((SECONDS >= deadline)); then
      signal_all KILL
    fi
    sleep 0.1
  done
  return "$first"
}

if [[ $dry_run ]]; then
  for ((index = 0; index < processes; index++)); do
    mapfile -t variables < <(environment_of "$index" PORT)
    call env "${variables[@]}" "$@"
  done
  exit
fi
trap stop TERM INT HUP
supervise "${DELAY:-1}" newest_step attempt "$@"
