# What all jobs do: start their ranks, hand the scheduler's signal on to them, and judge how they ended. Sourced by job scripts.
# shellcheck shell=bash

RESTARTS=3 # of a job that was killed, over all attempts, before somebody has to look
STEP=''
ASKED=''
STATUS=''

hand_on() { # srun passes it to every rank
  ASKED=1
  if [[ -n $STEP ]]; then
    kill -USR1 "$STEP"
  fi
}
trap hand_on USR1
# Slurm gives SIGTERM to the ranks itself, and this shell stays to judge how they end. It does not even notice the signal: of two
# that come at once, bash can lose the trap of the other one.
trap '' TERM

prepare() { # PROJECT WORKDIR ENVIRONMENT
  unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT # of the shell that submitted the job
  export PYTHONUNBUFFERED=1 PYTHONPATH="$1${PYTHONPATH:+:$PYTHONPATH}"
  INSIDE=()
  cd -- "$2" || exit 78
  # shellcheck source=env.sh
  . "$3" || exit 78
}

watch() { # FILE: the last attempt's word on how it ended is not this one's
  STATUS=$1
  BEFORE=$(written)
}

written() {
  stat --format='%i %y' -- "$STATUS" 2>/dev/null
}

run_ranks() { # COMMAND...: sets CODE
  if [[ -n $SLURM_JOB_NUM_NODES && -n $SLURM_NTASKS_PER_NODE ]]; then
    # SLURM_NTASKS is still that of the submission where somebody has given the waiting job other nodes.
    SRUN_OPTIONS+=(--ntasks=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE)))
  fi
  (trap - TERM USR1 && exec srun "${SRUN_OPTIONS[@]}" -- "${INSIDE[@]}" "$@") &
  STEP=$!
  if [[ -n $ASKED ]]; then
    kill -USR1 "$STEP"
  fi
  while true; do
    wait "$STEP" # which a signal to this shell ends, too
    kill -0 "$STEP" 2>/dev/null || break
  done
  wait "$STEP"
  CODE=$?
  if [[ -n $STATUS ]]; then
    read_status
  fi
}

read_status() { # srun can lose the ranks' code; what they wrote is the truth
  local said=''
  if [[ $(written) != "$BEFORE" ]]; then
    said=$(sed -n 's/.*"code": *\([0-9]\{1,3\}\).*/\1/p' "$STATUS" 2>/dev/null | head -n 1)
  fi
  if [[ -n $said ]]; then
    CODE=$said
  elif ((CODE == 0)); then
    CODE=137 # a rank that says nothing has not come to its end
  fi
}

settle() { # CODE REQUEUE: leave with the code; put the job back into the queue or hold it there
  local code=$1 restarts=${SLURM_RESTART_COUNT:-0} facts
  if ((code == 0 || $2 == 0)); then
    exit "$code"
  fi
  facts=$(scontrol --oneliner show job "$SLURM_JOB_ID")
  if [[ $facts == *' Reason=TimeLimit '* ]]; then
    if ((code == 75 || code == 76 || code > 128)); then
      put_back "$code" requeue
    fi
  elif [[ $facts != *' JobState=RUNNING '* ]]; then
    exit "$code" # cancelled, or put back already
  elif ((code == 75 || code == 76 || (code > 128 && restarts < RESTARTS))); then
    put_back "$code" requeue
  fi
  put_back "$code" requeuehold State=SpecialExit
}

put_back() { # CODE requeue|requeuehold ...
  local code=$1
  shift
  printf 'job %s ended with %s: scontrol %s\n' "$SLURM_JOB_ID" "$code" "$*"
  scontrol "$@" "$SLURM_JOB_ID"
  exit "$code"
}
