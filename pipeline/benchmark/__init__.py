"""The commands of `launch/benchmark.py`, one module each, and the tools that they measure with.

A command's module has `measure(options) -> dict` (figures that JSON can hold) and `table(figures) -> str`; its options are in
`options`. Times are medians of several runs in which the compared variants take turns, because a machine's speed
drifts; the ratios are what is worth reading.

step         a training step, beside plain next-token training of the same trunk
heads        the loss phase of all heads, beside full logits and `F.cross_entropy`
selection    the selection over ranks: time, and bytes moved
traffic      the collectives of a micro-step under ZeRO-3
gpu          what one GPU shows: steps, phases, memory beside the plan
plan         the expected speed of steps, beside their measured one
checkpoint   saving and loading, beside DeepSpeed's and torch's own
data         the data path: both of
preparing      documents to shards, beside the tokenizers library
streaming      shards to batches, beside a bare webdataset loop
options        the options of every command
timing         variants that take turns, their times and peaks
attempts       parts that may fail without the others
stepping       a run's steps, one whenever it is asked for
ranks          a plain function on several gloo ranks of this machine
child_process  a process that answers over a pipe, and whose end is noticed at once
collectives    records collectives, and counts the bytes on the sockets
phase_clock    the seconds of a step by phase
"""
