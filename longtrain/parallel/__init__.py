"""Ranks, collectives and ZeRO: everything that knows there is more than one process."""
