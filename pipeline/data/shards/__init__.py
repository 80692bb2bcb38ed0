"""Prepared shards: the format on disk, how it is written, read and checked.

Writing
    writer            tars of packed rows, with the offsets and checksums of their samples
    manifest          manifest.json: every count, size and hash of a prepared folder
    shard_files       the files of a shard, checked by their sizes
    table             the shards of a manifest as columns, for a million of them
    output_folder     the folder that a command writes: appears complete, one writer at a time
    external_scores   a number a token of the user's own making: rows out, scores in
    losses_writer     cached losses of a frozen reference, by many processes, resumable

Reading
    reader            samples by shard and sample index, each checked
    index             the index files of a shard: offsets and checksums, read in chunks
    open_shards       the open files of shards, a bounded number of them
    sample            the bytes of one sample, decoded to arrays
    reference_losses  cached losses of a frozen reference: their files, read beside the samples

Commands of launch/shards.py
    verification      checks every byte of a folder against its manifest
    inspection        describes a folder and shows some rows as text
    merging           joins the parts of a data set into one folder
    adoption          writes the manifest and index files of tars that others wrote
    tars              reads such tars without trusting them
"""
