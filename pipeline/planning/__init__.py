"""The memory plan: what each rank will need, computed from shapes before anything is built.

planned_job  the job that is planned: settings, ranks, device, sizes
resolve      a recipe, a DeepSpeed JSON and a number of ranks into a planned job
micro_batch  resolves `data.micro_batch: auto` by the plan
states       what DeepSpeed holds: weights, master weights, optimizer states, gradients, buckets
activations  what forward saves for backward, and what backward allocates
plan         adds these up at each moment of a step and takes the highest
advice       judges whether a plan fits, and what each setting would save
report       the plan as a table and as JSON
"""
