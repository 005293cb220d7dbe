#!/usr/bin/env bash
# Installs the programs that tests of launchers need and that are missing, from Debian's packages. Without root or Debian it
# changes nothing: those tests then skip, in one line that says why.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin DEBIAN_FRONTEND=noninteractive

declare -A package=(
  [slurmctld]=slurmctld [slurmd]=slurmd [sbatch]=slurm-client [munged]=munge [mpirun]=openmpi-bin [ip]=iproute2
  [shellcheck]=shellcheck
)
missing=()
for program in "${!package[@]}"; do
  command -v "$program" > /dev/null || missing+=("${package[$program]}")
done

(( ${#missing[@]} )) || exit 0
if [[ $EUID -ne 0 || ! -e /etc/debian_version ]]; then
  echo "missing: ${missing[*]} (only root on Debian can install them here); tests that need them are skipped"
  exit 0
fi
echo "installing ${missing[*]}"
apt-get -qq update
apt-get -qq install --yes --no-install-recommends "${missing[@]}" > /dev/null
