"""Runs one attack on many examples: places of a batch, threads, compilation.

`driver` keeps a batch of fixed size full, `slots` compiles its loop, `threads`
runs several batches in parallel, and `compilation` caches programs.
"""
