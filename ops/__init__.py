"""Numerical kernels: one folder an op, one public function each, several implementations behind it.

Nothing here imports another room of Lissom. `dispatch` chooses the implementation; `testing` checks each
against a float64 reference.
"""
