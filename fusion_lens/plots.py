"""Every figure of the package, one function for a question that a user asks.

| question | function |
|---|---|
| How far is the reference from the question at every layer? | `plot_delta_norms`, `plot_norm_map` |
| Do deltas point alike, between layers and between questions? | `plot_layer_cosines`, `plot_question_cosines`, `plot_generic_share` |
| What was read, and where is it written to? | `plot_tokens` |
| Which tokens did steering make likelier? | `plot_token_shifts` |
| Where in the network does the answer appear? | `plot_logit_lens` |
| Which segments, how strongly, do something on this model? | `plot_suggestion` |
| What was each coefficient worth, and which mattered? | `plot_search`, `plot_importance`, `plot_front` |
| Which features does a plan move, where, at which tokens, and do they do the work? | `plot_top_features`, `plot_layer_features`, `plot_token_features`, `plot_faithfulness` |
| Which units does a method keep, and how much of a step does each token get? | `plot_units`, `plot_gate` |
| What does each method do, what does it cost, and how few units are enough? | `plot_fronts`, `plot_units_curve` |
| What did each arm of a run do, and by how much more than the others? | `plot_scores`, `plot_differences`, `plot_reach`, `plot_coeffs`; `run_figures` gives all of a run |
"""  # noqa: E501

from fusion_lens.delta_plots import plot_delta_norms as plot_delta_norms
from fusion_lens.delta_plots import plot_generic_share as plot_generic_share
from fusion_lens.delta_plots import plot_layer_cosines as plot_layer_cosines
from fusion_lens.delta_plots import plot_norm_map as plot_norm_map
from fusion_lens.delta_plots import plot_question_cosines as plot_question_cosines
from fusion_lens.feature_plots import plot_faithfulness as plot_faithfulness
from fusion_lens.feature_plots import plot_layer_features as plot_layer_features
from fusion_lens.feature_plots import plot_token_features as plot_token_features
from fusion_lens.feature_plots import plot_top_features as plot_top_features
from fusion_lens.front_plots import plot_fronts as plot_fronts
from fusion_lens.front_plots import plot_units_curve as plot_units_curve
from fusion_lens.method_plots import plot_gate as plot_gate
from fusion_lens.method_plots import plot_units as plot_units
from fusion_lens.run_plots import plot_coeffs as plot_coeffs
from fusion_lens.run_plots import plot_differences as plot_differences
from fusion_lens.run_plots import plot_reach as plot_reach
from fusion_lens.run_plots import plot_scores as plot_scores
from fusion_lens.run_plots import run_figures as run_figures
from fusion_lens.suggestion_plots import plot_suggestion as plot_suggestion
from fusion_lens.token_plots import plot_logit_lens as plot_logit_lens
from fusion_lens.token_plots import plot_token_shifts as plot_token_shifts
from fusion_lens.token_plots import plot_tokens as plot_tokens
from fusion_lens.tuning_plots import plot_front as plot_front
from fusion_lens.tuning_plots import plot_importance as plot_importance
from fusion_lens.tuning_plots import plot_search as plot_search
