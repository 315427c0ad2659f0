#!/usr/bin/env bash
# Train over several nodes. Run the same line on every node, in checkouts of the same commit:
#   NNODES=2 MASTER_ADDR=first-node NANOCHAT_BASE_DIR=/shared/nanochat bash runs/nodes.sh runs/8xh100.py [--key=value]
# NANOCHAT_BASE_DIR must be one folder that all nodes see: data, tokenizer and checkpoints are made there once.
# NPROC is the number of ranks of this node (all its GPUs by default, 1 without), MASTER_PORT a free port there.
# A node that dies restarts the run from the newest checkpoint, up to 3 times. Slurm: srun --ntasks-per-node=1 bash ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
: "${NNODES:?the number of nodes}" "${MASTER_ADDR:?name or address of one of the nodes}"
: "${NANOCHAT_BASE_DIR:?a folder that all nodes see}"
set_up
nproc=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a new store after each failure: else ranks look for the dead ones
forward_signals
exec "$python" -m torch.distributed.run --nnodes="$NNODES" --nproc_per_node="$nproc" --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_id="nanochat-${SLURM_JOB_ID:-$MASTER_ADDR-${MASTER_PORT:-29500}}" \
    --rdzv_endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}" \
    -m scripts.base_train "$@"
