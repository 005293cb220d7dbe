#!/bin/bash
# Prepares a corpus on CPUs, by MPI:  sbatch --partition=cpu slurm/prepare_data.sh wikitext103 wikitext-103-v1.zip
#SBATCH --job-name=prepare_data
# Each task reads its share of the text.
#SBATCH --ntasks=8
#SBATCH --cpus-per-task=1
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
exec "${MEGAMOE_ROOT:-$SLURM_SUBMIT_DIR}/slurm/launch.sh" prepare_data "$@"
