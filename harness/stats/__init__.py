"""Statistics of the benchmark: arrays in, numbers out.

The unit of replication is the training seed. Everything here works on seed means and needs numpy and scipy only.
Higher is better throughout: a reward whose direction is "lower" is negated before it comes here.
"""
