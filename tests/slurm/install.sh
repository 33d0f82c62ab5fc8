#!/usr/bin/env bash
# Install SLURM and munge from the distribution, where they are missing and root may. Starts and configures nothing.
set -euo pipefail
PATH=$PATH:/usr/sbin
command -v slurmctld slurmd munged sbatch > /dev/null && exit 0
[ "$(id -u)" = 0 ] || { echo "error: SLURM is missing; as root: apt-get install slurm-wlm munge" >&2; exit 2; }
echo "Installing slurm-wlm and munge"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurm-wlm munge > /dev/null
