#!/bin/sh
#SBATCH --job-name=imgcls
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
# Trains on machines of a Slurm cluster: one torchrun on each, which starts a process per GPU. From the checkout:
#
#     sbatch scripts/slurm.sh CONFIG [CONFIG ...] [options] [KEY VALUE ...]
#
# Options of sbatch before the script win over the lines above: sbatch --nodes=1 --gpus-per-node=4 scripts/slurm.sh ...
# Three minutes before the time limit the run is told to save and to end, and the job goes back into the queue; a job
# that Slurm starts again goes on with --resume. So OUTPUT_DIR must be one that all machines see.
#
#     IMGCLS_ROOT              the checkout; default: the folder that sbatch was called in
#     IMGCLS_SCRIPT            train_net.sh (default) or train_net_builtin.sh
#     NPROC, MASTER_PORT       processes a machine (default: one per GPU), port of the rendezvous (default: by the job)
set -eu

refuse() {
    printf 'slurm.sh: %s\n' "$1" >&2
    exit 2
}

[ $# -gt 0 ] || refuse "usage: sbatch scripts/slurm.sh CONFIG [CONFIG ...] [options] [KEY VALUE ...]"
[ -n "${SLURM_JOB_ID:-}" ] || refuse "this is no Slurm job; submit it: sbatch scripts/slurm.sh $*"
# Slurm runs a copy of this file, so its own place says nothing.
root=${IMGCLS_ROOT:-$SLURM_SUBMIT_DIR}
script=$root/scripts/${IMGCLS_SCRIPT:-train_net.sh}
[ -f "$script" ] || refuse "there is no $script; call sbatch in the checkout, or set IMGCLS_ROOT"
cd -- "$root"

NNODES=$SLURM_JOB_NUM_NODES
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
: "${MASTER_PORT:=$((20000 + SLURM_JOB_ID % 20000))}" # jobs that share a machine differ
export NNODES MASTER_ADDR MASTER_PORT
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || set -- "$@" --resume

out_of_time=no
tell() { # the processes save and end
    [ "$1" = TERM ] || out_of_time=yes
    kill -TERM "$run" 2>/dev/null || :
}

# $SLURM_NODEID is the task's own: the shell that srun starts there must read it, not this one.
srun --kill-on-bad-exit=1 sh -c 'NODE_RANK=$SLURM_NODEID exec sh "$@"' sh "$script" "$@" &
run=$!
trap 'tell USR1' USR1
trap 'tell TERM' TERM
code=0
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do # a signal ended the waiting, not the run
    code=0
    wait "$run" || code=$?
done
if [ "$out_of_time" = yes ] && [ "$code" != 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
