#!/bin/bash
#SBATCH --job-name=large_enwik8
# One task per GPU. 44 streams divide over 1, 2, 4, 11, 22 or 44 tasks, 16 experts over 1, 2 or 4 of them.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Twice the longest save: ranks are told to save and stop this many seconds before the time is over.
#SBATCH --signal=USR1@300
exec "${MEGAMOE_ROOT:-$SLURM_SUBMIT_DIR}/slurm/launch.sh" train large_enwik8 "$@"
