"""From text to batches.

Three rooms: `corpus` makes rows of documents, `shards` is the format on disk, `loading` makes batches of rows. Corpus and
loading never meet; both stand on shards.

Here lies what all three stand on: the one error of data (`errors`), the tokenizer, stateless permutations and a bounded cache.
Nothing here imports `torch.distributed`: rank and world size are arguments.
"""
