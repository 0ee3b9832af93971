"""Slow statistical proofs: a method reaches what theory says it reaches. `tox -e proofs` runs them, `tox` does not.

What belongs here: trainings or samplings of more than ten seconds whose end is known independently of the method (a
closed form, a direct optimisation), on the closed-form Gaussian models. Whatever a formula, finite differences or one
update can decide in less stays with the ordinary tests. A proof's docstring says what is expected, where from, and why
its tolerance is what it is; it is deterministic given its seeds. All of them together take at most 30 minutes on two
cores.
"""
