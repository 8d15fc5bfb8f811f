"""Fault injection: whatever is killed or breaks, every input sample ends in exactly one committed row.

A package, unlike the other folders of tests, so that its fixture can live as long as its tests.
"""
