#!/usr/bin/env bash
# Trains on this machine: on all of its GPUs or TPU chips, else on the CPU.
#   bash launch/run.sh --config configs/mug.py --workdir runs/mug
#   CUDA_VISIBLE_DEVICES=0,1 bash launch/run.sh --config configs/mug.py
#   PYTHON=/opt/conda/bin/python bash launch/run.sh --config configs/mug.py
# Arguments are those of hatjax.train; paths count from the repository's root.
# Run it again to resume. Several machines: slurm.sbatch and tpu_pod.sh, or this
# on each of them with --distributed, the same JAX_COORDINATOR_ADDRESS=host:port
# and JAX_NUM_PROCESSES, and its own JAX_PROCESS_ID (0, 1, ...).
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi
export PYTHONUNBUFFERED=1             # log files grow as the run does
export CUDA_DEVICE_ORDER=PCI_BUS_ID   # GPUs are numbered as nvidia-smi does
# JAX takes three quarters of a GPU's memory at once. On a GPU that others use:
#   export XLA_PYTHON_CLIENT_PREALLOCATE=false
exec "$PYTHON" -m hatjax.train "$@"
