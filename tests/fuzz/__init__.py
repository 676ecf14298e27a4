"""A differential fuzzer over every op: `make fuzz`, or `python -m tests.fuzz --help`.

A case is a dictionary of plain values (sizes, dtype, layouts, options, seeds of the values), drawn from one integer by
cases.py, so that it can be printed, made smaller and run again. ops.py says for each op how tensors come from a case,
what the call is, its counterpart in torch and how large the terms are that its results sum up; direct.py calls the ops
of the schema below the public functions. check.py runs a case and compares, compare.py has the tolerances, and
oddities.py the differences that are torch's own. processes.py keeps a crash from losing its case; shrink.py makes a
failing case smaller and prints it as a script.
"""
