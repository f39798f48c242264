#!/usr/bin/env bash
# A run on GKE as a JobSet (https://jobset.sigs.k8s.io), which must be installed in the cluster.
#
#   launch/gke/gke.sh run -- COMMAND...   start it; Kubernetes restarts it after a preemption or a dead host
#   launch/gke/gke.sh logs                follow the output of the hosts
#   launch/gke/gke.sh stop                delete it: SIGTERM, so that it saves; also one that has ended, before the next
#
# Settings: NAME, IMAGE (with this repository in its working directory), HOSTS (of a slice), SLICES (1; of TPUs, joined by
# the data centre's network, each a job of its own in a node pool of its own), CHIPS (of each host), RESOURCE
# (google.com/tpu or nvidia.com/gpu), SELECTOR (YAML of node labels, such as
# "{cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice, cloud.google.com/gke-tpu-topology: 8x8}"), MAX_RESTARTS
# (100, after crashes in the whole run), ENV (names of variables of this shell that the command gets, such as
# WANDB_API_KEY,HF_TOKEN: as a Secret NAME-env, so that their values stand in no manifest of the run). --dry-run before
# the subcommand prints the commands and the manifest.
set -euo pipefail
MAX_RESTARTS=${MAX_RESTARTS:-100} SLICES=${SLICES:-1}
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/supervise.sh
source "$here/../supervise.sh"

dry_run=''
while [[ ${1:-} == -* ]]; do
  case $1 in
    --dry-run) dry_run=1 && shift ;;
    --help | -h) help && exit ;;
    *) refuse "unknown argument '$1'; --help tells the rest" ;;
  esac
done
subcommand=${1:-}
case $subcommand in
  run | logs | stop) shift ;;
  '') refuse "no subcommand: run, logs or stop" ;;
  *) refuse "unknown subcommand '$subcommand'; there are run, logs and stop" ;;
esac
needed=(NAME)
if [[ $subcommand == run ]]; then
  if [[ ${1:-} == -- ]]; then shift; elif (($#)); then refuse "unknown argument '$1'; the command goes after --"; fi
  (($#)) || refuse "no command; give it after --"
  needed+=(IMAGE HOSTS CHIPS RESOURCE SELECTOR)
elif (($#)); then
  refuse "$subcommand takes no argument, but was given '$1'"
fi
for setting in "${needed[@]}"; do [[ ${!setting:-} ]] || refuse "set $setting; --help tells what it is"; done
NAME=${NAME:?}
[[ $NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || refuse "NAME is '$NAME'; it should be lower-case letters, digits and -"
if [[ $subcommand == run ]]; then
  refuse_unless_number HOSTS "$HOSTS" 1
  refuse_unless_number CHIPS "$CHIPS" 1
  refuse_unless_number SLICES "$SLICES" 1
  if ((SLICES > 1)) && [[ $RESOURCE != google.com/tpu ]]; then
    refuse "SLICES is $SLICES, but $RESOURCE has no slices; HOSTS is the number of all hosts"
  fi
  refuse_unless_number MAX_RESTARTS "$MAX_RESTARTS" 0
  refuse_unless_set "$ENV"
fi

quoted() { # as a JSON string, which is YAML too
  local text=$1
  text=${text//\\/\\\\} text=${text//\"/\\\"} text=${text//$'\n'/\\n} text=${text//$'\t'/\\t}
  printf '"%s"' "$text"
}

manifest() {
  local text argument setting command=() env_from='[]' exclusive='{}' meeting=''
  text=$(<"$here/jobset.yaml")
  for setting in NAME IMAGE HOSTS SLICES CHIPS RESOURCE SELECTOR MAX_RESTARTS; do text=${text//@$setting@/"${!setting}"}; done
  if [[ $ENV ]]; then env_from="[{secretRef: {name: $NAME-env}}]"; fi
  if [[ $RESOURCE == google.com/tpu ]] && ((HOSTS * SLICES > 1)); then # of two pools alike a slice takes one
    exclusive='{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}'
  fi
  if ((SLICES == 1)); then # hosts of several meet by what GKE tells each of them
    meeting="- {name: DIFFDIS_NUM_PROCESSES, value: \"$HOSTS\"}
                    - {name: DIFFDIS_COORDINATOR_ADDRESS, value: \"$NAME-host-0-0.$NAME:8476\"}"
  fi
  text=${text//@ENV_FROM@/"$env_from"} text=${text//@MEETING@/"$meeting"} text=${text//@EXCLUSIVE@/"$exclusive"}
  for argument in "$@"; do command+=("$(quoted "${argument//\$/\$\$}"),"); done # Kubernetes takes $(A) for a variable
  printf '%s\n' "${text//@COMMAND@/"[${command[*]}]"}"
}

secret() {
  local name
  printf '%s\n' "apiVersion: v1" "kind: Secret" "metadata: {name: $NAME-env}" "stringData:"
  for name in ${ENV//,/ }; do printf '  %s: %s\n' "$name" "$(quoted "${!name}")"; done
}

case $subcommand in
  run)
    text=$(manifest "$@")
    if [[ $ENV ]]; then
      if [[ $dry_run ]]; then
        note "would hand over $ENV as the Secret $NAME-env"
      else
        secret | kubectl apply -f - >&2
      fi
    fi
    if [[ $dry_run ]]; then echo "$text"; fi
    call kubectl create -f - <<<"$text" || {
      code=$?
      note "kubectl did not start it; an earlier JobSet $NAME goes with 'stop'"
      exit "$code"
    }
    ;;
  logs) # of a host that was taken away the pod stays, without a log
    call kubectl logs --follow --prefix --ignore-errors --max-log-requests=1000 \
      --selector="jobset.sigs.k8s.io/jobset-name=$NAME"
    ;;
  stop)
    code=0 # the run also where secrets may not be touched
    call kubectl delete secret "$NAME-env" --ignore-not-found || code=$?
    call kubectl delete jobset "$NAME" || code=$?
    exit "$code"
    ;;
esac
