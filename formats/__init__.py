"""Bytes to arrays and back, one file per file format.

Nothing here knows what a model is: a reader checks everything that a header says before it trusts any of it,
hands out lazy tensors, and a writer lays out a header from names, types and shapes.
"""
