"""Speed of the parts of a run, by pytest-benchmark: `tox -e bench`."""
