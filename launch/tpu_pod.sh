#!/usr/bin/env bash
# A run on a Cloud TPU slice, as a queued resource.
#
#   launch/tpu_pod.sh create              ask for the slice, and wait until it is there
#   launch/tpu_pod.sh setup               this checkout and its environment onto every host, once
#   launch/tpu_pod.sh run -- COMMAND...   all three: the command on every host, again after a preemption or a dead host
#   launch/tpu_pod.sh logs                follow what the hosts say
#   launch/tpu_pod.sh stop                SIGTERM to the command, so that it saves
#   launch/tpu_pod.sh delete              give the slice back
#
# Settings: NAME, ZONE, TYPE (v5litepod-64), RUNTIME (v2-alpha-tpuv5-lite), SPOT=1, PROJECT. --dry-run before the
# subcommand prints the commands. COMMAND's --workdir must be a folder that all hosts share: gs://BUCKET/RUN.
set -euo pipefail
# shellcheck source=launch/supervise.sh
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

POLL=${POLL:-30} # seconds between two looks at the slice
dry_run=
[[ ${1:-} == --dry-run ]] && dry_run=1 && shift
usage() { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
subcommand=${1:-}
(($#)) && shift
[[ ${1:-} == -- ]] && shift
for setting in NAME ZONE TYPE RUNTIME; do
  [[ ${!setting:-} ]] || { echo "error: set $setting, such as NAME=run ZONE=us-west4-a TYPE=v5litepod-64 \
RUNTIME=v2-alpha-tpuv5-lite" >&2 && exit 2; }
done
NAME=${NAME:?} where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})

gcloud_() { if [[ $dry_run ]]; then printf '%q ' gcloud "$@" && echo; else gcloud "$@"; fi; }
resource() { gcloud_ compute tpus queued-resources "$1" "$NAME" "${where[@]}" "${@:2}"; }
on_all() { gcloud_ compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"; }
state() { gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' 2>/dev/null; }

create() {
  local now
  while true; do
    now=$([[ $dry_run ]] || state || true)
    case $now in
      ACTIVE) return ;;
      SUSPENDED | SUSPENDING | FAILED) resource delete --force --quiet || true ;;
      '') resource create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot} ;;
    esac
    [[ $dry_run ]] && return
    sleep "$POLL"
  done
}

setup() {
  local commit archive
  commit=$(git rev-parse HEAD)
  if [[ ! $dry_run ]] && on_all "grep -qx $commit diffdis/.commit" >/dev/null 2>&1; then return; fi
  archive=$(mktemp -d)/diffdis.tar.gz
  git archive --output="$archive" HEAD
  gcloud_ compute tpus tpu-vm scp "$archive" "$NAME:diffdis.tar.gz" "${where[@]}" --worker=all
  on_all "mkdir -p diffdis && tar -xzf diffdis.tar.gz -C diffdis && cd diffdis && python3 -m venv .venv &&\
 .venv/bin/pip install -q -r requirements.txt 'jax[tpu]' && echo $commit > .commit"
}

attempt() {
  create || return 1
  setup || return 1
  # flock waits for an attempt that is still ending. The code of a host comes by a file: ssh to several gives one of them.
  on_all "cd diffdis && rm -f .code && PATH=\$PWD/.venv/bin:\$PATH &&\
 { flock .running env$(printf ' %q' "$@") 2>&1; echo \$? > .code; } | tee -a run.log; exit \$(cat .code)" && return
  gcloud_ compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=0 --command="exit \$(cat diffdis/.code)"
}

progress() { # a new checkpoint, where the workdir can be listed
  [[ $dry_run || ! $workdir ]] || gcloud storage ls "$workdir/checkpoints/" 2>/dev/null | sort | tail -n 1 || true
}

case $subcommand in
  create | setup) "$subcommand" ;;
  run)
    (($#)) || usage
    workdir=$(workdir_of "$@")
    supervise progress attempt "$@"
    ;;
  logs) on_all "tail -n 100 -F diffdis/run.log" ;;
  stop) on_all "pkill -TERM -f '[d]iffdis_jax[.]' || true" ;;
  delete) resource delete --force --quiet ;;
  *) usage ;;
esac
