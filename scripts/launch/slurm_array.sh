#!/usr/bin/env bash
# A comparison, its runs shared out over the tasks of a job array, then one table:
#     id=$(sbatch --parsable --array=0-3 scripts/launch/slurm_array.sh WORKDIR --config=... --vary=... --seeds=5)
#     sbatch --dependency=afterok:$id scripts/launch/slurm_array.sh WORKDIR --config=... --vary=... --seeds=5 --merge
# WORKDIR must lie on a disk that all nodes share. The arguments of both lines are the same but for --merge, which
# trains nothing and measures all runs on the one node that it gets.
#SBATCH --job-name=lissom-compare
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --time=04:00:00
#SBATCH --output=%x-%A-%a.log
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
workdir=${1:?the first argument is the work directory}
shift
arguments=("--workdir=$workdir")
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
  shard="$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT"
  arguments+=("--shard=$shard")
fi
exec uv run --extra cuda scripts/compare.py "${arguments[@]}" "$@"
