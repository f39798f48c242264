#!/usr/bin/env bash
# A run on GKE as a JobSet (https://jobset.sigs.k8s.io, which must be installed in the cluster).
#
#   launch/gke/gke.sh run -- COMMAND...   start it; JobSet restarts it after a preemption or a dead host
#   launch/gke/gke.sh logs                follow what the hosts say
#   launch/gke/gke.sh stop                delete it: SIGTERM, so that it saves
#
# Settings: NAME, IMAGE (with this repository in its working directory), HOSTS, CHIPS (of each host), RESOURCE
# (google.com/tpu or nvidia.com/gpu), SELECTOR (YAML of node labels, such as
# "{cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice, cloud.google.com/gke-tpu-topology: 8x8}").
# --dry-run before the subcommand prints the commands and the manifest.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

dry_run=
[[ ${1:-} == --dry-run ]] && dry_run=1 && shift
usage() { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
subcommand=${1:-}
(($#)) && shift
[[ ${1:-} == -- ]] && shift
need() {
  local setting
  for setting in "$@"; do [[ ${!setting:-} ]] || { echo "error: set $setting; see the top of $0" >&2 && exit 2; }; done
}
call() { if [[ $dry_run ]]; then printf '%q ' kubectl "$@" && echo; else kubectl "$@"; fi; }

manifest() { # a command's argument becomes a JSON string
  local text argument setting arguments=
  text=$(<"$here/jobset.yaml")
  for argument in "$@"; do
    argument=${argument//\\/\\\\}
    arguments+=${arguments:+, }\"${argument//\"/\\\"}\"
  done
  for setting in NAME IMAGE HOSTS CHIPS RESOURCE SELECTOR; do text=${text//@$setting@/"${!setting}"}; done
  printf '%s\n' "${text//@COMMAND@/"[$arguments]"}"
}

need NAME
NAME=${NAME:?}
case $subcommand in
  run)
    (($#)) || usage
    need IMAGE HOSTS CHIPS RESOURCE SELECTOR
    [[ $dry_run ]] && manifest "$@"
    manifest "$@" | if [[ $dry_run ]]; then call apply -f -; else kubectl apply -f -; fi
    ;;
  logs) call logs --follow --prefix --max-log-requests=1000 --selector="jobset.sigs.k8s.io/jobset-name=$NAME" ;;
  stop) call delete jobset "$NAME" ;;
  *) usage ;;
esac
