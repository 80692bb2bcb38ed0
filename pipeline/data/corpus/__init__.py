"""Rows from documents, offline: what `launch/prepare.py` does, in the order of the data.

inputs         finds the input files and divides them into slices of work
documents      reads documents from files, and counts those that are left out
lines          reads lines of plain and compressed text files in bounded memory
columns        reads text columns of .parquet files and `hf:` folders
encoding       encodes texts, safe from special tokens' strings, and notes what has no token
tokenization   tokenises slices into sorted runs of ids, split into training and validation
sorted_runs    tokenised documents on disk, sorted by the shuffle's key (external sort)
shard_assembly  packs the shuffled documents of the sorted runs into shards, each by itself
packing        the two packing rules, `concat` and `best_fit`

prepare        prepares documents from anywhere, one by one; the settings of a preparation
prepare_files  prepares files with many workers, and resumes after a kill
request        the request that a preparation answers, to recognise its output
workers        runs tasks on many cores, and reports their progress
display        shows progress, as a bar or as lines of a log
builtin        prepares the corpus of the demo, without a network
"""
