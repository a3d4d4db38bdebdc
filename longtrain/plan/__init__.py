"""What a recipe comes to on given ranks, decided before anything is built."""

from longtrain.plan.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
