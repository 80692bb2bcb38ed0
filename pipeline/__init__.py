"""Selective multi-token prediction: MTP heads (arXiv 2404.19737) trained under Rho-1's selection (arXiv 2404.07965).

Imports point one way: launch → train → {model, weighting, data, runtime} → config (tests/unit/test_imports.py has the rule of
each room). A batch walks through: stream → batch → reference → policy hidden states → per-token losses → exchange → selection →
loss → engine → metrics.

train.py            the training loop; start reading here
micro_step.py       one micro-batch: reference, policy losses, selection, loss
run.py              everything a training run works with, and the result of a step
schedule.py         the learning rate, and the settings of the objective in each step
progress.py         the counters of a run, which checkpoints save
loss_spikes.py      how far a loss lies above those before it
consumption.py      counts the data of a step over all ranks, and reacts to damaged samples
rollback.py         the answer to a loss spike: back to a checkpoint, and on without the samples round it
rank_checks.py      what all ranks must hold alike, and compare at intervals
reporter.py         metrics, validations and terminal lines, each at its interval
step_clock.py       wall time of steps, waits for data, time left
time_left.py        how far a long piece of work has come, said now and then
passage.py          which heads select which tokens of one held-out passage
flops.py            useful FLOPs of a step, and the peak of known devices
evaluate.py         held-out losses
samples.py          what the policy writes while it is trained, in lock step on all ranks
scoring.py          stores a frozen reference's losses beside the data
saved_model.py      finds the model that a path means, and reads it without an engine
export_model.py     writes a model for other programs, and verifies it
evaluate_model.py   held-out figures of a model in files
model_card.py       describes an exported model

command_line.py     options, signals and exit codes of the commands that run on all ranks
on_all_ranks.py     runs such a command: checks, process group, what fails
options.py          the options that commands share
option_parser.py    parses options and reports all mistakes at once
model_options.py    those of commands that read a trained model
failures.py         turns a failure of a user or a machine into one message and an exit code
job.py              a job from start to end: prepare what is missing, then train
dry_run.py          two steps under measurement, beside the memory plan
assembly.py         builds a run from a job's settings
config.py           all settings, with defaults and units
data_settings.py    those of section `data`
model_settings.py   those of section `model`
rope_settings.py    the kinds of `model.rope_scaling`
setting_types.py    the types that settings are declared with
recipe.py           reads settings from YAML and the command line
recipe_layers.py    a recipe laid over those that it is based on
model_sizes.py      the shapes of models by name
run_length.py       steps, from tokens or epochs
other_names.py      what other trainers call our settings
yaml_text.py        parses YAML that somebody wrote
checks.py           all checks before any compute is spent, as one error
objective_checks.py  those between settings of the objective
data_checks.py      those of data sets and cached losses
model_checks.py     those of reference and pretrained weights
processes.py        processes of this machine, known by number and start time
derived.py          values derived from the settings and the files they name

data/               errors, tokenizer, special tokens, permutations, a bounded cache
data/corpus/        documents to rows, offline
data/shards/        the format on disk
data/loading/       rows to batches, online
storage/            paths and URLs, reads with retries, atomic writes, locks
model/              the transformer, the prediction heads, the reference, Hugging Face's layout
weighting/          cross-entropy, exact selection over ranks, the objective
generation/         decoding, plain and self-speculative
runtime/            process group, DeepSpeed, metrics, signals
runtime/checkpoint/  checkpoints of our own format, which any layout of ranks continues
slurm/              a job on Slurm: checks, logs, the copy of the code, requeueing
planning/           a job's memory and speed, computed before anything is built
benchmark/          what `launch/benchmark.py` measures
audit/              what a run can prove by its own records, for `launch/audit.py`
report/             pages and pictures of runs
experiment/         arms, seeds, statistics: does selection help?
"""
