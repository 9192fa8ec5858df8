# Sourced by train_net.sh and train_net_builtin.sh, which set tool, a file of tools/; starts it with torchrun.
#
#     sh scripts/NAME.sh CONFIG [options] [KEY VALUE ...]
#
#     NPROC                                            processes here; default: one per GPU, one without GPUs
#     NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT      with NNODES above 1: the same command on every machine,
#                                                      NODE_RANK 0 .. NNODES-1, MASTER_ADDR the address of rank 0

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/env.sh"

refuse() {
    printf '%s: %s\n' "$0" "$1" >&2
    exit "$2"
}

if [ $# -eq 0 ]; then
    printf 'usage: [NPROC=N] sh %s CONFIG [options] [KEY VALUE ...]\n' "$0" >&2
    exit 2
fi
config=$1
shift

[ -x "$PY" ] || refuse "there is no $PY; run sh scripts/setup_env.sh first" 1
: "${NPROC:=$("$PY" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"

if [ "${NNODES:-1}" = 1 ]; then
    set -- --standalone --nproc_per_node="$NPROC" "$root/tools/$tool" --config-file "$config" "$@"
else
    [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ] ||
        refuse "NNODES=$NNODES needs NODE_RANK (0 .. NNODES-1) and MASTER_ADDR (the machine of rank 0)" 2
    set -- --nnodes="$NNODES" --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" \
        --master_port="${MASTER_PORT:-29500}" --nproc_per_node="$NPROC" "$root/tools/$tool" --config-file "$config" "$@"
fi
exec "$PY" -m torch.distributed.run "$@"
