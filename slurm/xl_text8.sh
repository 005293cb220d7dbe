#!/bin/bash
#SBATCH --job-name=xl_text8
# One task per GPU. 512 streams divide over 64 tasks, 8 each, and 128 experts, 2 each; any power of two does.
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Twice the longest save: ranks are told to save and stop this many seconds before the time is over.
#SBATCH --signal=USR1@300
exec "${MEGAMOE_ROOT:-$SLURM_SUBMIT_DIR}/slurm/launch.sh" train xl_text8 "$@"
