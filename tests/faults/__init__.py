"""Fault injection: whatever is killed or breaks, every input sample ends up in exactly one committed row.

Unlike the other test folders this is a package, so that its fixture can have package scope.
"""
