"""Text into batches: sources of documents, tokenizers, exact packing, and the batches of a stage.

sources -> tokenizers -> packing (ArrayRecord shards) -> batches (grain). Only `packing` and `batches` know grain.
"""
