#!/usr/bin/env bash
# One run over several nodes, one process a node:
#     sbatch --nodes=2 scripts/launch/slurm.sh --config=configs/language/stdlib_lm.py --config.mesh.fsdp=2
# The folder must lie on a disk that all nodes share. The same command resumes a run that was stopped.
#SBATCH --job-name=lissom
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
uv sync --extra cuda
# srun sets SLURM_NTASKS for each process, from which train.py knows that it is one of several. --no-sync: the
# processes must not install into one environment at once.
exec srun --kill-on-bad-exit=1 uv run --no-sync train.py "$@"
