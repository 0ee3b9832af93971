"""Simulations with a known truth, whose tables stand in docs/statistics.md. `tox -e calibration` runs them.

Data are made as a benchmark makes them (effects of seeds, of prompts, of both together, of pictures; several shapes and
few seeds), the functions of `harness/stats` themselves are applied to every repetition, and what comes out is held
against what they promise. One test makes one table: it first checks its numbers with `tests.calibration.rates`, then
hands the table to the fixture `publish`, which compares it with the page between the markers

    <!-- calibration: NAME -->
    <!-- /calibration -->

or, with `tox -e calibration -- --write-tables`, writes it there. Seeds are fixed, so the same code gives the same
table. Where a check fails, the code or the claim is wrong: neither another seed nor a wider band is the remedy. All of
them together take at most 10 minutes on two cores.
"""
