#!/bin/bash
# Stands in for srun: two tasks with its variables; signals go to all of them; ends with the largest code.
while [[ "$1" == --* ]]; do shift; done
tasks=()
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=$rank "$@" &
  tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}" 2> /dev/null' USR1
trap 'kill -TERM "${tasks[@]}" 2> /dev/null' TERM
largest=0
for task in "${tasks[@]}"; do
  wait "$task"; code=$?
  while kill -0 "$task" 2> /dev/null; do wait "$task"; code=$?; done
  if ((code > largest)); then largest=$code; fi
done
exit "$largest"
