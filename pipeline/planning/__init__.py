"""The plan of a job: the memory that each rank will need and the speed to expect, from shapes, before anything is built.

planned_job   the job that is planned: settings, ranks, device, sizes
resolve       a recipe, a DeepSpeed JSON and a number of ranks into a planned job
micro_batch   resolves `data.micro_batch: auto` by the plan
states        what DeepSpeed holds: weights, master weights, optimizer states, gradients, buckets
activations   what forward saves for backward, and what backward allocates
plan          adds these up at each moment of a step and takes the highest
advice        judges whether a plan fits, and what each setting would save
hardware      the peaks of cards and networks that a speed is planned from
traffic       the collectives of a step, counted from shapes
speed         the seconds of a step by part, tokens a second, MFU
speed_advice  what each setting that makes a job faster would bring
speed_report  the speed as lines and as JSON
report        the plan as a table and as JSON
"""
