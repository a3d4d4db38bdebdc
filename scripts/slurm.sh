#!/bin/bash
# One training run on several nodes under Slurm. Two commands, from the folder that holds runs/ and data/, which all nodes share:
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/slurm.sh --recipe llama-7b-128k                 # start, or go on where the run stopped
#   sbatch --nodes 2 --gpus-per-node 8 scripts/slurm.sh --recipe llama-7b-128k --set training.steps=20000     # and train for longer
#
# What follows the script's name goes to scripts/train.py. Before paying for the nodes:
#
#   longtrain plan llama-7b-128k --set device=cuda --ranks 16          and on one node        srun --gpus 8 longtrain doctor
#
# parallel.cp should divide the GPUs of a node: rings then stay inside it. Activate the environment before sbatch, or below.
#
# Five minutes before the end Slurm asks the run to save. The step that is running and the save must fit into that time, and after a
# preemption into the partition's GraceTime. To have more:
#
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT=890 sbatch --signal TERM@900 ...    # seconds that torchrun and that Slurm wait; needs torch 2.12
#
# After a preemption or a time limit the same command goes on from the newest checkpoint; after a preemption Slurm gives it itself.
#SBATCH --job-name=longtrain
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -euo pipefail

# the first node's name (not by a pipe into head, which may end scontrol, and so the job, by SIGPIPE), and a port that two jobs on
# one node do not share
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${HOSTS%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# torchrun passes the signal on, and kills its ranks 30 s later unless it is told to wait until Slurm would
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-290}
if [[ $(torchrun --help) != *--shutdown-timeout* ]]; then
  echo "WARNING: the torchrun of this torch kills its ranks 30 s after it is asked to stop, so a step and a save must fit into" \
    "that; torch 2.12 waits TORCH_ELASTIC_SHUTDOWN_TIMEOUT ($TORCH_ELASTIC_SHUTDOWN_TIMEOUT s)" >&2
fi

# one torchrun a node; --kill-on-bad-exit ends the others when one node has failed, instead of letting them wait
srun --kill-on-bad-exit=1 bash -c '
  exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --master-addr "$0" --master-port "$1" "${@:2}"
' "$MASTER_ADDR" "$MASTER_PORT" scripts/train.py "$@"
