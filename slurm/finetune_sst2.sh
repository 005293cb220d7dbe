#!/bin/bash
# Makes a sentence classifier of a checkpoint:
#   sbatch slurm/finetune_sst2.sh --checkpoint runs/large_enwik8-hyper/best --data data/SST-2
#SBATCH --job-name=finetune_sst2
# One task per GPU.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Twice the longest save: ranks are told to save and stop this many seconds before the time is over.
#SBATCH --signal=USR1@300
exec "${MEGAMOE_ROOT:-$SLURM_SUBMIT_DIR}/slurm/launch.sh" finetune --task sst2 "$@"
