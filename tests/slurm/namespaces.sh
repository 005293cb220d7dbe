#!/usr/bin/env bash
# The part of a test cluster that runs inside its Linux namespaces; tests/slurm/cluster.py calls it.
#
#   namespaces.sh hold NODES    the whole cluster, as long as standard input is open; prints the id of
#                               the process whose namespaces they are when they are there
#   namespaces.sh boot NODE     switch a node on     \ these two on the login node
#   namespaces.sh cut NODE      cut a node's power   /
#
# The login node is one set of namespaces. /run is a file system of its own there: sockets, configuration, state and
# logs never meet those of the machine or of another cluster, and end with it. Nodes are namespaces within: when
# the first process of the login node dies, the kernel ends every process of the cluster.
set -euo pipefail

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
freezer=/sys/fs/cgroup/freezer
new_machine=(unshare --uts --ipc --mount --pid --fork --kill-child --mount-proc bash "$0")

hold() {
  local cgroup='' first
  # With proctrack/cgroup, as on real clusters, signals reach the tasks that srun started and SIGKILL all they started.
  if mkdir "$freezer/megamoe-test-$$" 2> /dev/null; then cgroup=$freezer/megamoe-test-$$; fi
  (exec setpriv --pdeathsig KILL unshare --net "${new_machine[@]}" login "$1" "$cgroup" "$BASHPID") &
  local machine=$!
  cat <&0 > /dev/null &       # ends when the caller closes the pipe, or dies
  wait -n "$machine" $! || true
  first=$(cat "/proc/$machine/task/$machine/children" 2> /dev/null) || true
  kill -KILL "${first:-$machine}" 2> /dev/null || true
  [[ -z $cgroup ]] || remove "$cgroup"
  wait "$machine" || true     # over when the last process of the cluster is gone
}

remove() {  # a process that Slurm has frozen dies when it is thawed
  local attempt
  for attempt in {1..100}; do
    find "$1" -name freezer.state -exec sh -c 'echo THAWED > "$1"' _ {} \; 2> /dev/null || true
    find "$1" -depth -type d -exec rmdir {} \; 2> /dev/null || true
    [[ -d $1 ]] || return 0
    sleep 0.1
  done
  echo "cannot remove $1 after $attempt attempts" >&2
}

login() {
  local nodes=$1 cgroup=$2 machine=$3 i
  echo login > /proc/sys/kernel/hostname
  mount -t tmpfs -o mode=755 tmpfs /run
  mkdir -p /run/munge /run/netns /run/slurm/{dev,log,spool,state}
  configure "$nodes" "$cgroup"
  if [[ -n $cgroup ]]; then mount --bind "$cgroup" "$freezer"; fi
  mount --bind /run/slurm/hosts /etc/hosts
  network "$nodes"
  echo "$machine"

  (umask 077 && head -c 128 /dev/urandom > /run/munge/key)
  munged --foreground --key-file=/run/munge/key --seed-file=/run/munge/seed &> /run/slurm/log/munged.log &
  for i in {1..200}; do [[ -S /run/munge/munge.socket.2 ]] && break; sleep 0.05; done
  SLURM_CONF=/run/slurm/slurm.conf slurmctld -D -c &> /run/slurm/log/slurmctld.err &
  wait -n || true
  echo "munged or slurmctld ended:" >&2
  tail -n 5 /run/slurm/log/* >&2
}

configure() {
  local nodes=$1 cgroup=$2 i proctrack=linuxproc
  cp "$here"/etc/{slurm,gres}.conf /run/slurm
  if [[ -n $cgroup ]]; then
    cp "$here/etc/cgroup.conf" /run/slurm
    proctrack=cgroup
  fi
  cat >> /run/slurm/slurm.conf <<CONF
ProctrackType=proctrack/$proctrack
NodeName=node[1-$nodes] CPUs=128 RealMemory=1000000 Gres=gpu:8
CONF
  for i in {0..7}; do mknod -m 666 "/run/slurm/dev/nvidia$i" c 1 3; done
  {
    echo '127.0.0.1 localhost'
    echo '198.51.100.254 login'
    for (( i = 1; i <= nodes; i++ )); do echo "198.51.100.$i node$i"; done
  } > /run/slurm/hosts
}

network() {  # one bridge without a way out; every node is plugged in by a cable called after it
  local i node
  ip link set lo up
  ip link add bridge type bridge forward_delay 0
  ip addr add 198.51.100.254/24 dev bridge
  ip link set bridge up
  for (( i = 1; i <= $1; i++ )); do
    node=node$i
    ip netns add "$node"
    ip link add "$node" type veth peer name eth0 netns "$node"
    ip link set "$node" master bridge
    ip -n "$node" addr add "198.51.100.$i/24" dev eth0
    ip -n "$node" link set eth0 up
    ip -n "$node" link set lo up
  done
}

boot() {
  ip link set "$1" up
  nsenter --net="/run/netns/$1" "${new_machine[@]}" node "$1" &>> "/run/slurm/log/$1.err" < /dev/null &
}

node() {
  echo "$1" > /proc/sys/kernel/hostname
  mount -t tmpfs tmpfs /dev/shm
  # Not exec: the first process of a node has to reap orphans, and slurmd does not.
  slurmd -D -N "$1" &
  wait $!
}

cut() {  # the cable first: a node without power does not say goodbye to its peers
  local i
  ip link set "$1" down
  for i in {1..200}; do
    ip netns pids "$1" | xargs --no-run-if-empty kill -KILL 2> /dev/null || true
    [[ -n $(ip netns pids "$1") ]] || return 0
    sleep 0.05
  done
  echo "$1: still running after $i attempts to kill it: $(ip netns pids "$1" | xargs)" >&2
  return 1
}

"$@"
