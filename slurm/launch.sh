#!/usr/bin/env bash
# Runs a megamoe command on every task of a Slurm job. The templates beside it call it; docs/slurm.md tells the whole story.
#
#   launch.sh train PRESET [--config FILE] [--deepspeed_config FILE] [section.option=value ...]
#   launch.sh preflight PRESET [--config FILE] [--deepspeed_config FILE] [section.option=value ...]
#   launch.sh finetune --task TASK --checkpoint DIR [option ...] [section.option=value ...]
#   launch.sh evaluate CHECKPOINT [option ...] [section.option=value ...]
#   launch.sh prepare_data CORPUS [PATH ...] [option ...]
set -euo pipefail
shopt -s nullglob

# Exit codes of megamoe (docs/training.md) after which a job is not requeued, or is without further ado.
readonly USER_ERROR=2 STOPPED_ON_SIGNAL=75 INTERRUPTED=130
readonly MAX_FAILURES=3    # in a row that brought no newer checkpoint
readonly VERSIONS='
import importlib.metadata, platform
names = ("torch", "deepspeed", "numpy", "mpi4py")
found = {d.name: d.version for d in importlib.metadata.distributions() if d.name in names}
print(", ".join([f"Python {platform.python_version()}"] + [f"{name} {found[name]}" for name in names if name in found]))'

main() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  # shellcheck source=slurm/site.env
  source slurm/site.env
  choose_software
  export_variables
  local command=${1:-}
  case $command in
    train | preflight | finetune | evaluate | prepare_data) "$command" "${@:2}" ;;
    *) echo "launch.sh: error: '$command': choose from train, preflight, finetune, evaluate, prepare_data" >&2; exit "$USER_ERROR" ;;
  esac
}

say() { echo "$(date -Is) launch.sh: $*"; }

# ---- commands ----------------------------------------------------------------------------------------------------------

train() {
  local preset=$1
  find_data "$@"
  local words=(--preset "$preset" "${output_dir[@]}" "${data[@]}" "${@:2}")
  run_dir=$(alone -m megamoe config --run-folder "${words[@]}")    # refuses a mistake before any task is started
  open_job_folder
  alone -m megamoe config "${words[@]}" > "$job_dir/config.json"
  run_with_requeue -m megamoe train "${words[@]}"
}

preflight() {
  find_data "$@"
  run_dir=${MEGAMOE_OUTPUT_DIR:-runs}/$SLURM_JOB_NAME
  open_job_folder
  on_all_tasks -m megamoe preflight --preset "$1" "${output_dir[@]}" "${data[@]}" "${@:2}"
}

finetune() {
  local words=("${output_dir[@]}" name="$SLURM_JOB_NAME" "$@") place=() word
  for word in "${words[@]}"; do
    [[ $word != name=* && $word != output_dir=* ]] || place+=("$word")
  done
  run_dir=$(alone -m megamoe config --run-folder "${place[@]}")
  open_job_folder
  run_with_requeue -m megamoe finetune "${words[@]}"
}

evaluate() {
  run_dir=${MEGAMOE_OUTPUT_DIR:-runs}/$SLURM_JOB_NAME
  open_job_folder
  on_all_tasks -m megamoe evaluate "$@"
}

prepare_data() {
  local words=("$@")
  if [[ ${1:-} != verify && " $* " != *" --output"* ]]; then
    words+=(--output "${MEGAMOE_DATA_DIR:-data}/${1:-}")
  fi
  run_dir=${MEGAMOE_OUTPUT_DIR:-runs}/$SLURM_JOB_NAME
  open_job_folder
  if [[ ${MEGAMOE_MPI:-} == mpirun ]]; then
    mpirun "${python[@]}" tools/prepare_data.py "${words[@]}"
  else
    step_options+=(${MEGAMOE_MPI:+--mpi="$MEGAMOE_MPI"})
    on_all_tasks tools/prepare_data.py "${words[@]}"
  fi
}

# Set `data` to the option that names the prepared corpus of a preset, unless the command says something of data itself.
find_data() {
  data=()
  [[ " $* " != *" data."* && " $* " != *" --config "* ]] || return 0
  local corpus=${1#*_}
  local folder=${MEGAMOE_DATA_DIR:-data}/${corpus%_h64}
  if [[ -d $folder ]]; then
    data=(data.path="$folder")
  else
    say "note: there is no $folder (slurm/prepare_data.sh makes it): a text bundled with megamoe is used, if there is one"
  fi
}

# ---- the site ----------------------------------------------------------------------------------------------------------

# Set `python` to the words that start it, and `container` to the options by which srun enters an image, if one is given.
choose_software() {
  if [[ -n ${MEGAMOE_MODULES:-} ]]; then
    set +u    # the code behind `module` reads unset variables
    # shellcheck disable=SC2086
    module load $MEGAMOE_MODULES
    set -u
  fi
  local image=${MEGAMOE_CONTAINER:-} mounts=$PWD:$PWD${MEGAMOE_CONTAINER_MOUNTS:+,$MEGAMOE_CONTAINER_MOUNTS}
  container=() step_options=()
  python=("${MEGAMOE_PYTHON:-python3}")
  if [[ $image == *.sif ]]; then
    python=(apptainer exec --nv --bind "$mounts" "$image" "${python[@]}")
  elif [[ -n $image ]]; then
    container=(--container-image="$image" --container-mounts="$mounts" --container-workdir="$PWD")
  elif [[ -z ${MEGAMOE_PYTHON:-} && -x .venv/bin/python ]]; then
    python=(.venv/bin/python)
  fi
}

export_variables() {
  output_dir=(${MEGAMOE_OUTPUT_DIR:+output_dir="$MEGAMOE_OUTPUT_DIR"})
  if [[ -n ${SBATCH_PARTITION:-} && $SBATCH_PARTITION != "$SLURM_JOB_PARTITION" ]]; then
    say "note: slurm/site.env names partition $SBATCH_PARTITION, this job is in $SLURM_JOB_PARTITION; \`source\` it before sbatch"
  fi
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_ASYNC_ERROR_HANDLING=1
  export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
}

# ---- what is kept of a job -----------------------------------------------------------------------------------------------

open_job_folder() {
  job_dir=$run_dir/jobs/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
  mkdir -p "$job_dir"
  keep_code
  describe_job | tee "$job_dir/environment.txt"
}

# The commit, and what has changed since (new files are not in it before `git add`); without git, the files themselves.
keep_code() {
  local parts=(megamoe tools slurm ds_configs pyproject.toml constraints.txt)
  export GIT_OPTIONAL_LOCKS=0    # the elements of an array do this at the same time
  if git archive --output="$job_dir/code.tar.gz" HEAD "${parts[@]}" 2> /dev/null; then
    git diff --binary HEAD -- "${parts[@]}" > "$job_dir/code.diff"
    [[ -s $job_dir/code.diff ]] || rm "$job_dir/code.diff"
  else
    tar --create --gzip --dereference --exclude=__pycache__ --file="$job_dir/code.tar.gz" "${parts[@]}"
  fi
}

describe_job() {
  local commit
  commit=$(git describe --always --dirty --abbrev=40 --exclude='*' 2> /dev/null) || commit="not a git checkout"
  echo "job            $SLURM_JOB_ID ($SLURM_JOB_NAME), restart ${SLURM_RESTART_COUNT:-0}, at $(date -Is)"
  echo "hosts          ${hosts[*]}"
  echo "code           $PWD, $commit"
  echo "folder         $job_dir"
  echo "software       $(srun --version), $(alone -c "$VERSIONS")"
  env | grep -E '^(MEGAMOE|NCCL|TORCH|GLOO|UCX|FI|OMP|CUDA|MASTER|DS)_' | sort
}

# ---- processes -----------------------------------------------------------------------------------------------------------

# One Python, here; inside the image if there is one.
alone() {
  if (( ${#container[@]} )); then
    srun --nodes=1 --ntasks=1 "${container[@]}" "${python[@]}" "$@"
  else
    "${python[@]}" "$@"
  fi
}

# One Python on every task; returns the highest exit code. Rank 0 is seen in the job's log too.
on_all_tasks() {
  local rc=0
  srun --kill-on-bad-exit=1 --wait=60 --export=ALL --output="$job_dir/rank-%5t.log" \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    ${MEGAMOE_CPU_BIND:+--cpu-bind="$MEGAMOE_CPU_BIND"} \
    "${step_options[@]}" "${container[@]}" "${python[@]}" "$@" &
  local step=$!
  tail --pid="$step" --sleep-interval=0.5 --lines=+1 --retry --follow=name "$job_dir/rank-00000.log" 2> /dev/null &
  wait "$step" || rc=$?
  wait    # for tail, which shows the rest first
  return "$rc"
}

# ---- requeue -------------------------------------------------------------------------------------------------------------

run_with_requeue() {
  local rc=0 before failures
  before=$(newest_checkpoint)
  on_all_tasks "$@" || rc=$?
  failures=$(count_failures "$rc" "$before")
  case $rc in
    0) ;;
    "$USER_ERROR" | "$INTERRUPTED") say "ended with $rc, which no other try would change; see $job_dir" ;;
    "$STOPPED_ON_SIGNAL") requeue "stopped on a signal, all is saved" ;;
    *)
      if (( failures < MAX_FAILURES )); then
        requeue "ended with $rc"
      else
        say "ended with $rc: $failures failures in a row brought no newer checkpoint, giving up; see $job_dir"
      fi ;;
  esac
  exit "$rc"
}

newest_checkpoint() {
  local steps=("$run_dir"/checkpoints/step-*)
  (( ${#steps[@]} == 0 )) || echo "${steps[-1]}"
}

# Failures in a row that brought no newer checkpoint, this end included; kept in the run folder from job to job.
count_failures() {
  local rc=$1 before=$2 kept=$run_dir/jobs/failures failures=0
  if [[ $(newest_checkpoint) == "$before" ]]; then
    [[ ! -s $kept ]] || failures=$(< "$kept")
    (( rc == 0 || rc == STOPPED_ON_SIGNAL )) || failures=$((failures + 1))
  fi
  echo "$failures" | tee "$kept"
}

# Put the job back into the queue, which ends this script; returns where Slurm does not allow it.
requeue() {
  local job=$SLURM_JOB_ID
  # By its number, the last element of an array stands for the whole array.
  [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  say "$1: requeue"
  if scontrol requeue "$job"; then
    sleep 120
  fi
  say "the job was not requeued; the same sbatch goes on with the run"
}

main "$@"
