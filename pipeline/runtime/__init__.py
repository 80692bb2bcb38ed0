"""Everything between the training loop and the machine: process group, DeepSpeed, checkpoints, metrics, signals.

distributed     rank, world size and device; the small collectives by which ranks agree
network         the network interface by which gloo reaches other machines
engine          DeepSpeed engines of policy and reference; the only importer of deepspeed
parameters      shapes and optimizer groups of parameters, whole or partitioned
deepspeed_json  validates and resolves the DeepSpeed JSON
checkpoint      checkpoints in a format of our own: saved in the background, verified, loaded in any layout
identity        settings and fingerprints that a resumed run must share with its checkpoint
model_content   fingerprints of model folders, of every byte, read by the ranks of a node together
preemption      requests to stop: SIGTERM, SIGUSR1, a file STOP
beat            what a rank tells the others of itself
launcher        ends a rank whose launcher is gone
run_lock        one job per run directory
heartbeat       this process's heartbeat: no rank waits for another without end
rank_watch      notices a rank that died or stands still, names it, ends the job
flight_recorder  keeps a rank's last collectives when a job ends because a rank hangs
agreement       checks that ranks have not diverged; agrees to stop where nothing is to be saved
non_finite      the rule for numbers that are not finite, and its collective parts
metrics         the selection's statistics, summed on the device, reduced over ranks at intervals
draft_agreement  how often a head's choice is the one that head 0 will make
events          events.jsonl: what has happened to a run, for `launch/audit.py`
logbook         writes metrics.jsonl, and gives its records to trackers
event_files     TensorBoard's files: the run itself, each head and each source
sample_log      samples.jsonl: what the policy wrote while it was trained
tensorboard     runs, tags, charts and histograms in TensorBoard
wandb_run       the same records at Weights & Biases, where asked for
terminal        progress lines, selection blocks, the table that closes a run
table           plain-text tables
profiling       traces of some steps, and the switch to deterministic kernels
description     config.yaml and environment.json of a run directory
code_version    the commit of the code that runs
memory          measures memory in use and at the peak
"""
