"""Models over many devices: the only home of mesh axes, shard_map and collectives.

A Plan (plan.py) says where a model runs. It hands the model callables with the signatures of the
local ones; all else follows from the names of dims and one table (rules.py).
"""
