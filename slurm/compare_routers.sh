#!/bin/bash
# Compares routing policies over seeds; each element of the array trains one policy with one seed:
#   sbatch slurm/compare_routers.sh
#   ROUTERS="hyper smoe" SEEDS="1 2 3" PRESET=medium_text8 sbatch --array=0-5 slurm/compare_routers.sh training.max_steps=50000
#SBATCH --job-name=compare_routers
# As many as there are routers times seeds.
#SBATCH --array=0-5
# One task per GPU. 22 streams divide over 1, 2, 11 or 22 tasks, 16 experts over 1 or 2 of them.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Twice the longest save: ranks are told to save and stop this many seconds before the time is over.
#SBATCH --signal=USR1@300
set -euo pipefail

preset=${PRESET:-small_enwik8}
read -r -a routers <<< "${ROUTERS:-hyper smoe smoe_dropout}"
read -r -a seeds <<< "${SEEDS:-1 2}"
index=$SLURM_ARRAY_TASK_ID last=$((${#routers[@]} * ${#seeds[@]} - 1))
if (( index > last )); then
  echo "SLURM_ARRAY_TASK_ID = $index: routers '${routers[*]}' and seeds '${seeds[*]}' have elements 0 to $last;" \
    "give sbatch --array=0-$last" >&2
  exit 2
fi
router=${routers[index / ${#seeds[@]}]} seed=${seeds[index % ${#seeds[@]}]}
exec "${MEGAMOE_ROOT:-$SLURM_SUBMIT_DIR}/slurm/launch.sh" train "$preset" "$@" \
  moe.router.name="$router" training.seed="$seed" name="compare_$preset/$router-seed$seed"
