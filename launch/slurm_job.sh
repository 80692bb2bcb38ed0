# shellcheck shell=bash disable=SC2154
# Sourced by train.sbatch and score.sbatch with the script of launch/ and its arguments. $code: the checkout, or a job's copy of it.

# Bindings are those of the job within which this one was submitted, on other cores; sbatch passes them on and sets none itself.
for name in "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}"; do unset "$name"; done

# The site's own: modules, the virtual environment, NCCL's settings. Such scripts seldom bear `set -u`, so they come first.
# shellcheck source=/dev/null
[[ ! -f $code/launch/site.sh ]] || . "$code/launch/site.sh"
set -euo pipefail

if ! command -v python3 >/dev/null || ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "slurm: error: no python3 of version 3.11 or newer on $HOSTNAME: activate the virtual environment before sbatch, or set" \
        "what your site needs (module load, . …/activate) in launch/site.sh" >&2
    exit 2
fi
# -P: not the code of the current folder, which is the checkout.
PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} exec python3 -P -m pipeline.slurm.batch_job "$@"
