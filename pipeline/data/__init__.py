"""From text to batches: documents, tokenizer, packed shards, and the order in which a job reads them.

The modules in the order of the data's way: `inputs` finds files and slices them, `documents` reads text (`columns`, `tars`),
`tokenization` turns it into ids (`tokenizer`) in `runs` on disk, from which `assembly` packs (`packing`) and writes `shards`;
`manifest` describes a prepared folder; `prepare` and `resumable` do all of that, on many `workers`. `parts` merges folders,
`verification` and `inspection` look at them, `foreign` adopts those of others. `shard_reader` reads rows, `order` (with
`shard_order`) says which row comes when, `stream` reads the rows of one rank, `batch` holds them as tensors. `builtin` prepares
the demo's corpus. Nothing here imports `torch.distributed`: rank and world size are arguments.
"""
