"""fusion_lens: prompt-specific activation steering at every layer, on TransformerLens hook points.

Question -> prompts -> activations -> deltas -> plan -> hooks -> steered completions -> scores, and
a search over the plan's coefficients. Each stage is a module of its own; this one names what users
call.
"""

from fusion_lens.activations import Activations as Activations
from fusion_lens.activations import activations_from_cache as activations_from_cache
from fusion_lens.activations import record as record
from fusion_lens.crosscoder_files import load_crosscoder as load_crosscoder
from fusion_lens.crosscoder_files import save_crosscoder as save_crosscoder
from fusion_lens.deltas import Deltas as Deltas
from fusion_lens.deltas import deltas_from_caches as deltas_from_caches
from fusion_lens.deltas import make_deltas as make_deltas
from fusion_lens.dictionaries import Dictionary as Dictionary
from fusion_lens.dictionaries import fit_to_model as fit_to_model
from fusion_lens.errors import FusionLensError as FusionLensError
from fusion_lens.experiment import run as run
from fusion_lens.experiment_config import ExperimentConfig as ExperimentConfig
from fusion_lens.generation import Completion as Completion
from fusion_lens.generation import GenerationConfig as GenerationConfig
from fusion_lens.generation import Row as Row
from fusion_lens.generation import generate as generate
from fusion_lens.hooks import fwd_hooks as fwd_hooks
from fusion_lens.hooks import steering as steering
from fusion_lens.models import load_model as load_model
from fusion_lens.panel import SteeringPanel as SteeringPanel
from fusion_lens.panel import steering_panel as steering_panel
from fusion_lens.plan_files import load_plan as load_plan
from fusion_lens.plan_files import save_plan as save_plan
from fusion_lens.plans import Plan as Plan
from fusion_lens.plans import Segment as Segment
from fusion_lens.plans import even_segments as even_segments
from fusion_lens.plans import full as full
from fusion_lens.plans import make_plan as make_plan
from fusion_lens.plans import one_layer as one_layer
from fusion_lens.plans import per_layer as per_layer
from fusion_lens.plans import thirds as thirds
from fusion_lens.preparation import TuningConfig as TuningConfig
from fusion_lens.preset_files import load_preset as load_preset
from fusion_lens.preset_files import save_preset as save_preset
from fusion_lens.presets import preset_starts as preset_starts
from fusion_lens.prompts import Prompt as Prompt
from fusion_lens.prompts import Template as Template
from fusion_lens.prompts import question_prompt as question_prompt
from fusion_lens.prompts import reference_prompt as reference_prompt
from fusion_lens.prompts import tokenize as tokenize
from fusion_lens.questions import Question as Question
from fusion_lens.questions import load_questions as load_questions
from fusion_lens.questions import select_questions as select_questions
from fusion_lens.results import Results as Results
from fusion_lens.results import load_results as load_results
from fusion_lens.saes import load_sae as load_sae
from fusion_lens.search import SearchConfig as SearchConfig
from fusion_lens.similar_starts import similar_starts as similar_starts
from fusion_lens.starts import Starts as Starts
from fusion_lens.steps import Affine as Affine
from fusion_lens.steps import Gate as Gate
from fusion_lens.steps import Step as Step
from fusion_lens.suggestions import suggest as suggest
from fusion_lens.tuning import tune as tune
