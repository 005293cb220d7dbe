#!/bin/bash
#SBATCH --job-name=small_enwik8
# One task per GPU. 22 streams divide over 1, 2, 11 or 22 tasks, 16 experts over 1 or 2 of them.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Twice the longest save: ranks are told to save and stop this many seconds before the time is over.
#SBATCH --signal=USR1@300
exec "${MEGAMOE_ROOT:-$SLURM_SUBMIT_DIR}/slurm/launch.sh" train small_enwik8 "$@"
