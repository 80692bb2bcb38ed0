"""Rows to batches, online.

`order` (with `shard_order`) says which row comes when, `mixture` from which data set; `stream` reads the rows of one rank
(`lane_reader`, `sizes`), `batch` holds them as tensors, `prefetch` brings them to the device. `sample_trace` tells which sample
reaches which rank in which step.
"""
