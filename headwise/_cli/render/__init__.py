"""Print the results of the verbs for a reader. Each function prints one kind of result through the console."""

from headwise._cli.render.conversion import render_conversion, render_plan, render_push, render_verification
from headwise._cli.render.inspection import render_inspection
from headwise._cli.render.measured import render_bench, render_demo, render_evaluation, render_uptraining

__all__ = [
    "render_bench",
    "render_conversion",
    "render_demo",
    "render_evaluation",
    "render_inspection",
    "render_plan",
    "render_push",
    "render_uptraining",
    "render_verification",
]
