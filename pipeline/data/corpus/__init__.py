"""Rows from documents, offline: what `launch/prepare.py` does, in the order of the data.

inputs         finds the input files and divides them into slices of work
file_search    finds the files of a folder or glob, and knows two names of one file
documents      reads documents from files
counts         counts them and those that are left out, and notes where the first of these are
decoding       decodes the text of a document, and knows files that are something else
lines          reads lines of plain and compressed text files in bounded memory, each byte once
tar_texts      finds the documents of a tar
columns        reads text columns of .parquet files and `hf:` folders
encoding       encodes texts, safe from special tokens' strings, and notes what has no token
removed_text   finds the text that a tokenizer removes because of what it stands among
panics         keeps what the tokenizers library prints of its panics from standard error
tokenization   tokenises slices into sorted runs of ids, split into training and validation
sorted_runs    tokenised documents on disk, sorted by the shuffle's key (external sort)
shard_assembly  packs the shuffled documents of the sorted runs into shards, each by itself
packing        the two packing rules, `concat` and `best_fit`

prepare        prepares documents from anywhere, one by one; the settings of a preparation
prepare_files  prepares files with many workers, and resumes after a kill
prepare_stages  the stages of that: tokenise, pack, publish
contents       what an input holds, as one number
request        the request that a preparation answers, to recognise its output
workers        runs tasks on many cores, and reports their progress
display        shows progress, as a bar or as lines of a log
builtin        prepares the corpus of the demo, without a network
"""
