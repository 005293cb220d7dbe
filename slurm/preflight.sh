#!/bin/bash
# Measures the nodes a run would get:  sbatch --nodes=2 slurm/preflight.sh large_enwik8 [option ...] [section.option=value ...]
#SBATCH --job-name=preflight
# One task per GPU, as for the run itself.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=00:15:00
#SBATCH --output=%x-%j.log
#SBATCH --no-requeue
exec "${MEGAMOE_ROOT:-$SLURM_SUBMIT_DIR}/slurm/launch.sh" preflight "$@"
