"""Batches from rows, online: which rows a rank reads in which step, and how they reach the device.

    order         the order of rows in an epoch, and the lanes it is cut into; a pure function of samples consumed
    shard_order   the order of shards in an epoch, grouped where there are very many
    mixture       several data sets as one: the set of each row, the joined manifest
    skipping      stretches of rows that a run leaves out
    sizes         checks that lanes, batches, ranks, workers and data fit together
    lane_reader   reads a worker's lanes, round by round, as chunks of a few rounds
    stream        one rank's micro-batches from any position of the run
    held_out      one rank's micro-batches of every row of a validation folder
    batch         a micro-batch as tensors, and the targets and valid pairs of each head
    prefetch      a background thread that copies batches to the device ahead of use
    sample_trace  lists which sample reaches which rank in which step
    row_digest    a number that tells which sample a step had in which row, on any number of ranks
    order_record  the order as a JSON value, from which it is computed again

A batch walks through: order → lane_reader → stream → batch → prefetch.
"""
