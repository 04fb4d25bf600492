#!/usr/bin/env bash
# One run on this machine, a rank per GPU:  launch/local.sh experiment=text train.epochs=3
#   NUM_RANKS=4 launch/local.sh      so many ranks; without GPUs the default is one
#   MAX_RESTARTS=3 launch/local.sh   when a rank dies, all start anew from the newest checkpoint, up to so often
set -euo pipefail

ranks=${NUM_RANKS:-$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')}
cores=$(nproc)
# The ranks share the cores: with more threads than cores, each would run slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

# --standalone takes a free port, so that several runs can share the machine.
exec torchrun --standalone --nproc-per-node="$ranks" --max-restarts="${MAX_RESTARTS:-0}" -m distaccum.train "$@"
