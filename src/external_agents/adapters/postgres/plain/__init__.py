"""
The ledger row by row: one transaction of a few statements for every step, decided by the domain's own rules.

It keeps the same promises as the grouped one, at a tenth of its pace. It is what that one is measured and proved
against.
"""
