"""Published steering methods, a file for each, with its formula and paper at its head.

Each is fitted on activations (`site_activations.record_at`) and returns an ordinary plan, gate or
mask of units. A plan's coefficients are 1: its strength is `plan * strength`, by the name that the
paper gives it. Plans are made for no prompt of their own (`prompts.NO_PROMPT`).
"""
