"""Placement: which device holds which expert, solved with a bound."""
