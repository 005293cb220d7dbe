#!/bin/bash
# Scores a checkpoint:  sbatch slurm/evaluate.sh runs/large_enwik8-hyper/best evaluation.top_ks=1,2,4
#SBATCH --job-name=evaluate
# One task per GPU; any number does.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
exec "${MEGAMOE_ROOT:-$SLURM_SUBMIT_DIR}/slurm/launch.sh" evaluate "$@"
