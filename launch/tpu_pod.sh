#!/usr/bin/env bash
# Run a command on one or several Cloud TPU slices, as a queued resource.
#
#   launch/tpu_pod.sh create              ask for the slice, and wait until it is there
#   launch/tpu_pod.sh setup               copy this commit to every host and install it, once
#   launch/tpu_pod.sh run -- COMMAND...   all three: the command on every host, again after a preemption or a dead host
#   launch/tpu_pod.sh run --each=0-27 -- COMMAND...   one after another with --only=0 to --only=27, as ablate run takes it
#   launch/tpu_pod.sh logs                follow the output of the hosts
#   launch/tpu_pod.sh stop                SIGTERM to the command, so that it saves
#   launch/tpu_pod.sh delete              give the slice back
#
# Settings: NAME, ZONE, TYPE (v5litepod-64), RUNTIME (v2-alpha-tpuv5-lite; of v5p v2-alpha-tpuv5, of v6e v2-alpha-tpuv6e),
# SLICES (1; several are joined by the data centre's network), SPOT=1, PROJECT, CREATE_FLAGS (more of gcloud's for create,
# such as "--reserved --network=NET --service-account=ACCOUNT"), SSH_FLAGS (more of gcloud's for ssh and scp, such as
# --internal-ip where CREATE_FLAGS has --internal-ips), MAX_RESTARTS (3, without a new checkpoint), EXTRAS (tpu, or more
# of pyproject.toml's, such as tpu,wandb), ENV (names of variables of this shell that the command gets, such as
# WANDB_API_KEY,HF_TOKEN; their values show in no list of processes). --dry-run before the subcommand prints the commands.
# COMMAND's --workdir must be a folder that all hosts share: gs://BUCKET/RUN. Ctrl-C ends a run as stop does.
# Each host copies data that lie in a bucket to its disk, of 100 GiB. For larger ones COMMAND may begin with
# env XDG_CACHE_HOME=/dev/shm, which keeps the copy in memory, of which that folder may take half.
set -euo pipefail
# shellcheck source=launch/supervise.sh
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"

POLL=${POLL:-30} # seconds between two looks at the slice
EXTRAS=${EXTRAS:-tpu}
SLICES=${SLICES:-1}
dry_run='' stopping=''
while [[ ${1:-} == -* ]]; do
  case $1 in
    --dry-run) dry_run=1 && shift ;;
    --help | -h) help && exit ;;
    *) refuse "unknown argument '$1'; --help tells the rest" ;;
  esac
done
subcommand=${1:-}
case $subcommand in
  create | setup | run | logs | stop | delete) shift ;;
  '') refuse "no subcommand: create, setup, run, logs, stop or delete" ;;
  *) refuse "unknown subcommand '$subcommand'; there are create, setup, run, logs, stop and delete" ;;
esac
each=('') # nothing, or the numbers of a list
if [[ $subcommand == run ]]; then
  if [[ ${1:-} == --each=* ]]; then
    if ! [[ $1 =~ ^--each=([0-9]{1,4})-([0-9]{1,4})$ ]] || ((10#${BASH_REMATCH[1]} > 10#${BASH_REMATCH[2]})); then
      refuse "$1 should be --each=FIRST-LAST, such as --each=0-27"
    fi
    mapfile -t each < <(seq "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}")
    shift
  fi
  if [[ ${1:-} == -- ]]; then shift; elif (($#)); then refuse "unknown argument '$1'; the command goes after --"; fi
  (($#)) || refuse "no command; give it after --"
elif (($#)); then
  refuse "$subcommand takes no argument, but was given '$1'"
fi
needed=(NAME ZONE)
case $subcommand in create | run) needed+=(TYPE RUNTIME) ;; esac
for setting in "${needed[@]}"; do
  [[ ${!setting:-} ]] ||
    refuse "set $setting, as in NAME=run ZONE=us-west4-a TYPE=v5litepod-64 RUNTIME=v2-alpha-tpuv5-lite"
done
[[ $EXTRAS =~ ^[a-z]+(,[a-z]+)*$ ]] ||
  refuse "EXTRAS is '$EXTRAS'; it should be extras of pyproject.toml, such as tpu,wandb"
refuse_unless_set "$ENV"
refuse_unless_number SLICES "$SLICES" 1
case ${SPOT:=0} in 0) SPOT='' ;; 1) ;; *) refuse "SPOT is '$SPOT'; it should be 1 or 0" ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case $subcommand in # before anything is rented
  setup | run) commit=$(git rev-parse HEAD 2>&1) || refuse "no commit to copy to the hosts: ${commit##*$'\n'}" ;;
esac
# shellcheck disable=SC2206  # words, as the user wrote them
NAME=${NAME:?} where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"}) through=(${SSH_FLAGS:-})

# These are gcloud's names of the nodes of a request for several slices.
if ((SLICES > 1)); then mapfile -t nodes < <(seq -f "$NAME-%.0f" 0 $((SLICES - 1))); else nodes=("$NAME"); fi

resource() { call gcloud compute tpus queued-resources "$1" "$NAME" "${where[@]}" "${@:2}"; }
# A host that dies does not close its connection, on which ssh alone would wait for two hours.
ssh_to() {
  call gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" --worker=all --ssh-flag="-o ServerAliveInterval=30" \
    "${through[@]}" --command="$2"
}
copy_to() { call gcloud compute tpus tpu-vm scp "$2" "$1:$3" "${where[@]}" --worker=all "${through[@]}"; }
on_all() { on_slices ssh_to "$@"; }
copy_to_all() { on_slices copy_to "$@"; }

# Call a function for all slices at once, with the slice's name before the other arguments. It fails if one call fails.
on_slices() {
  local node pid pids=() code=0
  if [[ $dry_run ]] || ((SLICES == 1)); then # one after another, so that what is printed is in order
    for node in "${nodes[@]}"; do "$1" "$node" "${@:2}" || return; done
    return
  fi
  for node in "${nodes[@]}"; do "$1" "$node" "${@:2}" & pids+=($!); done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return "$code"
}

# Print ACTIVE, SUSPENDED, ..., or NONE if there is no such resource. If gcloud cannot tell, fail with its reason.
state() {
  local said
  if said=$(resource describe --format='value(state.state)' 2>&1); then
    echo "${said##*$'\n'}"
  elif [[ $said == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "$said" >&2
    return 1
  fi
}

create() {
  local now asked=''
  if [[ $dry_run ]]; then now=NONE; else now=$(state) || return 1; fi
  while [[ $now != ACTIVE ]]; do
    if [[ $stopping ]]; then return 1; fi
    case $now in
      NONE)
        # shellcheck disable=SC2206  # words, as the user wrote them
        local which=(--node-id="$NAME") flags=(${CREATE_FLAGS:-})
        if ((SLICES > 1)); then which=(--node-count="$SLICES" --node-prefix="$NAME"); fi
        resource create "${which[@]}" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot} \
          "${flags[@]}" || return 1
        asked=1
        ;;
      FAILED | SUSPENDED)
        if [[ $asked && $now == FAILED ]]; then
          note "the request for $TYPE failed; 'gcloud compute tpus queued-resources describe $NAME' says why"
          return 1
        fi
        resource delete --force --quiet || return 1
        ;;
    esac
    if [[ $dry_run ]]; then return; fi
    pause "$POLL"
    now=$(state) || true # it has said why, and is asked again: the wait may take days
  done
}

# uv brings a Python of its own, since that of a TPU VM may be too old for this package. A command that still runs there
# keeps its code and its environment to its end. Files of an earlier commit are removed: they would count as this one's.
setup() {
  local installed="$commit $EXTRAS" folder
  if [[ ! $dry_run ]] && on_all "grep -qx '$installed' diffdis/.commit" >/dev/null 2>&1; then return; fi
  folder=$(mktemp -d)
  git archive --output="$folder/diffdis.tar.gz" "$commit" &&
    copy_to_all "$folder/diffdis.tar.gz" '' &&
    on_all "set -e; $on_every_host mkdir -p diffdis; cd diffdis; exec 9>.lock; take_lock;\
 rm -rf .commit configs diffdis_jax; tar -xzf ../diffdis.tar.gz;\
 python3 -m pip install -q --user uv; ~/.local/bin/uv venv -q --clear --python=3.12 .venv;\
 ~/.local/bin/uv pip install -q -e '.[$EXTRAS]'; echo '$installed' >.commit" ||
    return 1
  rm -r "$folder"
}

# Copy the variables that ENV names into a file on the hosts that nobody else there may read. The command's shell reads
# and removes it.
hand_over() {
  local folder name
  [[ $ENV ]] || return 0
  folder=$(mktemp -d)
  for name in ${ENV//,/ }; do printf 'export %s=%q\n' "$name" "${!name}"; done >"$folder/.env" # a built-in: no process
  chmod 600 "$folder/.env" && copy_to_all "$folder/.env" diffdis/
  local code=$?
  rm -r "$folder"
  return "$code"
}

# On a host, in ~/diffdis: .pid has the number of the command's process and when that began, by which another process
# that got the number since is recognised. is_running leaves the number in $pid. take_lock waits for the command's end.
# shellcheck disable=SC2016  # for the host to expand
on_every_host='began() { sed -n "s/.*) \([^Z]\) /\1 /p" "/proc/$1/stat" 2>/dev/null | cut -d" " -f20; };'\
' is_running() { read -r pid since 2>/dev/null <.pid && [ "$since" ] && [ "$since" = "$(began "$pid")" ]; };'\
' take_lock() { flock -n 9 && ! is_running || { echo "waiting for the command that runs here";'\
' flock 9; while is_running; do sleep 1; done; }; };'

# Print what every host runs for the command in attempt $1. The lock waits for an attempt that is still ending. If the
# connection is lost, the command keeps running; gcloud connects again and asks for the same attempt, and the host
# answers how it ended. The command does not inherit the lock, since a process that it leaves behind would keep it. It
# leads a group, which is killed afterwards. If the shell with the lock dies, the next one waits for the command itself.
# The last line tells the launcher this host's code, because ssh to several hosts returns one code for all of them.
on_host() {
  local attempt=$1
  shift
  printf '%s' "set -e; $on_every_host cd diffdis; exec 9>.lock; take_lock;" \
    " if [ \"\$(cat .attempt 2>/dev/null)\" = $attempt ]; then code=\$(cat .code 2>/dev/null || echo 255);" \
    " echo \"host ended with code \$code\"; exit \$code; fi; rm -f .code; echo $attempt >.attempt;" \
    "${ENV:+ . ./.env;} rm -f .env;" \
    " export DIFFDIS_LAUNCHED=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PATH=\$PWD/.venv/bin:\$PATH; touch run.log; from=\$((\$(wc -c <run.log) + 1));" \
    " set -m;$(printf ' %q' "$@") </dev/null >>run.log 2>&1 9>&- & pid=\$!; set +m;" \
    " echo \$pid \$(began \$pid) >.pid; tail -c +\$from -F --pid=\$pid run.log 2>/dev/null 9>&- &" \
    " code=0; wait \$pid || code=\$?; rm .pid; kill -KILL -- -\$pid 2>/dev/null || true;" \
    " echo \$code >.code; wait;" \
    " echo \"host ended with code \$code\"; exit \$code"
}

# shellcheck disable=SC2016
interrupt="$on_every_host"' if cd diffdis 2>/dev/null && is_running; then kill -TERM "$pid"; fi'
finish() {
  stopping=1
  note "telling the hosts to save"
  on_all "$interrupt" </dev/null >/dev/null 2>&1 &
}

# Return code 2, 130 or 75 of any host, or else the highest: other hosts may fail after such a code. Ctrl-C in a terminal
# ends gcloud too. Then the hosts are asked again how the attempt ended; a host that has not begun it does nothing.
run_once() {
  local said pid code attempt asked again=''
  attempt="$(date +%s)-$RANDOM$RANDOM"
  create && setup && hand_over || return 1
  if [[ $stopping ]]; then return 1; fi
  if [[ $dry_run ]]; then on_all "$(on_host "$attempt" "$@")" && return; fi
  said=$(mktemp) asked=$(on_host "$attempt" "$@")
  while true; do
    { on_all "$asked" 2>&1 </dev/null || echo "host ended with code 255, or could not be reached"; } | tee "$said" &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
    code=$(sed -n 's/.*host ended with code \([0-9]*\).*/\1/p' "$said" | sort -n | awk '{ has[$1] = 1; last = $1 }
      END { print (2 in has) ? 2 : (130 in has) ? 130 : (75 in has) ? 75 : (NR ? last : 255) }')
    if [[ ! $stopping || $again ]] || ((code != 255)); then break; fi
    again=1 asked=$(on_host "$attempt" sh -c "exit $PREEMPTED")
  done
  rm "$said"
  return "$code"
}

attempt() {
  local code=0
  run_once "$@" || code=$?
  if ((code != 0)) && ! is_meant "$code" && [[ ! $stopping ]]; then
    pause "$POLL" # a slice that is being taken away may take a while to say so
    case $(state || true) in SUSPENDING | SUSPENDED) code=$PREEMPTED ;; esac
  fi
  return "$code"
}

case $subcommand in
  create | setup) "$subcommand" ;;
  run)
    workdir=$(workdir_of "$@")
    trap finish TERM INT
    worst=0
    for number in "${each[@]}"; do # one that fails is reported, and the next ones run
      code=0
      supervise "${DELAY:-10}" newest_step attempt "$@" ${number:+--only="$number"} || code=$?
      if ((code)); then worst=$code; fi
      if [[ $stopping ]]; then break; fi
      if ((code && ${#each[@]} > 1)); then note "number $number ended with code $code"; fi
    done
    exit "$worst"
    ;;
  logs) on_all "tail -n 100 -F diffdis/run.log" ;;
  stop) on_all "$interrupt" ;;
  delete) resource delete --force --quiet ;;
esac
