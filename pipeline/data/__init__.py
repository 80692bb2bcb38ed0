"""Data: from documents to batches.

    corpus        documents → rows, offline (launch/prepare.py)
    shards        the format of prepared data on disk: written, read and checked
    loading       rows → batches, online (launch/train.py)

    errors        DataError, the one error of data
    tokenizer     trains, loads and identifies tokenizers
    token_bytes   the bytes of text that each token of a tokenizer stands for
    special_tokens  the tokens that end and begin documents, as a tokenizer's folder declares them
    declared_tokens  the tokens that the folder declares special beside its tokenizer
    tokenizer_files  a tokenizer as other programs read it, beside a model
    permutation   stateless permutations, the same on every machine
    lru_cache     a cache of bounded size, for index chunks and open files

corpus and loading do not import each other; both stand on shards, and all three on the modules here. Nothing imports
`torch.distributed`: rank and world size are arguments.
"""
