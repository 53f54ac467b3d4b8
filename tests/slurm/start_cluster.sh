#!/usr/bin/env bash
# A Slurm cluster of two nodes on this machine, without systemd or cgroups, for trying the batch scripts:
#   tests/slurm/start_cluster.sh DIRECTORY        root; needs Debian's slurm-wlm and munge; names the nodes in /etc/hosts
# Two partitions over the same nodes: `low` is requeued when `high` wants them. Stop with tests/slurm/stop_cluster.sh.
set -euo pipefail

directory=$(realpath -m "${1:?usage: start_cluster.sh DIRECTORY}")
mkdir -p "$directory/state" /run/munge /var/log/munge /var/lib/munge
if [[ ! -e /etc/munge/munge.key ]]; then
    dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none
fi
chown -R munge: /etc/munge /run/munge /var/log/munge /var/lib/munge
chmod 400 /etc/munge/munge.key
chmod 755 /run/munge
munge --no-input > /dev/null 2>&1 || runuser -u munge -- /usr/sbin/munged

host=$(hostname -s)
nodes=(sa3dist-1 sa3dist-2)
for node in "${nodes[@]}"; do
    getent hosts "$node" > /dev/null || echo "127.0.0.1 $node" >> /etc/hosts
done
cat > "$directory/slurm.conf" << CONF
ClusterName=sa3dist-test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
SchedulerParameters=sched_interval=2,bf_interval=2
SchedulerType=sched/backfill
ReturnToService=2
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool-%n
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd-%n.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd-%n.log
$(for i in "${!nodes[@]}"; do
    echo "NodeName=${nodes[i]} NodeHostname=$host NodeAddr=127.0.0.1 Port=$((17001 + i)) CPUs=$(nproc --all)"
done)
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
CONF
export SLURM_CONF=$directory/slurm.conf
slurmctld
for node in "${nodes[@]}"; do
    slurmd -N "$node"
done
for _ in $(seq 30); do
    if [[ $(sinfo --noheader --format=%D-%t --partition=low 2> /dev/null) == "${#nodes[@]}-idle" ]]; then
        echo "export SLURM_CONF=$SLURM_CONF"
        exit 0
    fi
    sleep 1
done
echo "start_cluster.sh: the nodes are not idle after 30 s; see $directory/slurm*.log" >&2
exit 1
