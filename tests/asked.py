"""Two questions and a search short enough for a test."""

from __future__ import annotations

from fusion_lens.generation import GenerationConfig
from fusion_lens.preparation import TuningConfig
from fusion_lens.questions import Question
from fusion_lens.search import SearchConfig

QUICK = TuningConfig(
    search=SearchConfig(trials=8, round_size=4, high=6.0),
    generation=GenerationConfig(max_new_tokens=10),
    explanation_tokens=8,
)
ASKED = Question(id="red", question="Who wrote the red book?", answer="Ada Lovelace")
OTHER = Question(
    id="born", question="When was Tom born?", answer="3 May 1901", explanation="He was"
)
