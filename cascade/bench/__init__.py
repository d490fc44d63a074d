"""`cascade bench`: what this machine makes of a model, next to what its memory bus allows.

`cascade.bench.run.run` is the entry.
"""
