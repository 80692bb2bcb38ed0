"""From text to batches: documents, tokenizer, packed shards, and the order in which a job reads them.

The modules in the order of the data's way: `documents` reads text, `tokenizer` turns it into ids, `packing` cuts rows of
T tokens, `shards` writes and reads them, `manifest` describes a prepared folder, `prepare` does all of that; `order` says
which row comes when, `stream` reads the rows of one rank, `batch` holds them as tensors. `builtin` prepares the demo's
corpus. Nothing here imports `torch.distributed`: rank and world size are arguments.
"""
