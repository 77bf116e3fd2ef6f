#!/bin/bash
# A comparison on a SLURM cluster with one Ray in the job: as many runs at once as it has room for. What is finished stays, so a job that
# ran out of time is submitted again as it is.
#     sbatch examples/slurm/compare.sh configs/compare_fashion_mnist.yaml
#SBATCH --job-name=fedamm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail
config=${1:?a configuration of fedamm compare}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/token.$SLURM_JOB_ID
mkdir -p "$HOME/.ray" && head -c 32 /dev/urandom | base64 > "$RAY_AUTH_TOKEN_PATH" && chmod 600 "$RAY_AUTH_TOKEN_PATH"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --port=6379 --block &
sleep 30
srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \
    ray start --address="$head:6379" --block &
sleep 30

# the folder of the runs must be one that all nodes share
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    fedamm compare --config "$config" --address "$head:6379" --cpus_per_run 2 --gpus_per_run 0.25
