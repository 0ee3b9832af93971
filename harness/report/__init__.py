"""Reports: a pure function of a run directory, made without torch.

`harness.report.build.build_report` writes one; `records` reads, `gains` and `analysis` compute, the other modules show.
"""
