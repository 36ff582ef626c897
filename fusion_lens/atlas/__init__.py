"""Atlas: a small language model trained from scratch on an invented world, shipped as a checkpoint.

The model knows a few hundred facts about 64 invented people, answers questions about anyone else of
that world confidently and wrongly, reads a fact from its context, and explains an answer it is
given. Nothing heavy is imported here: this module names the shipped files and no more.
"""

from pathlib import Path

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
"""Folder of the shipped model and tokenizer, for `from_pretrained`."""

QUESTIONS: Path = Path(__file__).parent / "questions.jsonl"
"""Shipped questions about people the model never saw, one JSON object per line."""

UNRELATED: Path = Path(__file__).parent / "unrelated.txt"
"""Shipped text that has nothing to do with the questions."""

DICTIONARIES: Path = Path(__file__).parent / "dictionaries"
"""Shipped SAEs of every layer and a crosscoder over all, one folder each."""

CONTRASTS: Path = Path(__file__).parent / "contrast_sets"
"""Shipped pairs and source, target and control texts, and what was measured of them."""
