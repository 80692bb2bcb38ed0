"""A job on Slurm, from its batch script's point of view: `launch/train.sbatch` and `launch/score.sbatch` run `batch_job`.

It stands on Python alone, because the machine that runs a batch script may have torch in a container only.

batch_job       a life of a job: before its ranks, beside them, after them
before_start    checks and preparations before the ranks start: GPUs, the first node's address, a port
code_copy       the code that a job keeps, so that a requeued one runs what it began with
commands        what Slurm says of a job and does with it
ranks           srun, and the request to stop that reaches the ranks when it is time
rank_logs       a log for each rank, and what the job's own log shows of them
requeueing      whether a job that has ended is put into the queue again
"""
