"""What every method must hold, as checks that run on tiny models: `python -m harness check`.

`lab.py` builds what a method is given, `trained.py` and `inference.py` hold the contracts of the two kinds of methods,
`shared.py` those of both, `check.py` runs them and prints the table.
"""
