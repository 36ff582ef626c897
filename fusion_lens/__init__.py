"""fusion_lens: prompt-specific activation steering at every layer, on TransformerLens hook points.

Question -> prompts -> activations -> deltas -> plan -> hooks -> steered completions -> scores, and
a search over the plan's coefficients. Each stage is a module of its own; this one has what users
call: `__init__.pyi` names it, and a module is imported when something of it is first asked for.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("fusion-lens")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
