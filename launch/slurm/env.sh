# Everything that depends on the cluster, for all jobs whose scripts lie beside this file. launch/slurm/render.py copies it
# here once and never overwrites it: edit it. Every job sources it with bash on its first node; what it exports, all ranks get.
# shellcheck shell=bash disable=SC2034  # launch/slurm/job.sh reads what is set here

# Software. PYTHON is the interpreter that rendered the job, in a container the container's python3.
# module load cuda/12.8
# PYTHON=/opt/envs/video/bin/python

# More options of every srun, such as --cpu-bind=cores or --mpi=none.
SRUN_OPTIONS=()

# Folders that containers see beside those of the project, of the working directory and of the run, such as (/data /scratch).
CONTAINER_MOUNTS=()

# The network between nodes, which must be private: nothing on it is encrypted or asked for a password. Ranks meet at the name
# of the first node; MASTER_ADDR names another of its interfaces.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export MASTER_ADDR="$(hostname -s)-ib0"

# Compiled extensions and kernels, in a folder of one's own that all nodes can write.
# export TORCH_EXTENSIONS_DIR=$HOME/.cache/video/torch_extensions TRITON_CACHE_DIR=$HOME/.cache/video/triton

# How a command is started inside of IMAGE, which sees every FOLDER: options of srun, or a command in front of the command.
enter_pyxis() { # IMAGE FOLDER...
  local image=$1 mounts='' folder
  shift
  for folder in "$@" "${CONTAINER_MOUNTS[@]}"; do
    mounts+=${mounts:+,}$folder:$folder
  done
  SRUN_OPTIONS+=(--container-image="$image" --container-mounts="$mounts" --container-workdir="$PWD")
}

enter_apptainer() { # IMAGE FOLDER...
  local image=$1 folder
  shift
  INSIDE=(apptainer exec --pwd "$PWD")
  if ((${SLURM_GPUS_ON_NODE:-0} > 0)); then
    INSIDE+=(--nv)
  fi
  for folder in "$@" "${CONTAINER_MOUNTS[@]}"; do
    INSIDE+=(--bind "$folder:$folder")
  done
  INSIDE+=("$image")
}
