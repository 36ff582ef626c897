"""The text formats that Atlas is trained on, steered in and probed with.

A prompt never ends in white space: a completion begins with the line break or the space itself.
"""

from collections.abc import Callable, Sequence

Complete = Callable[[Sequence[str], int], list[tuple[str, bool]]]
"""(prompts, max_new_tokens) -> one (completion, ended by itself) for each prompt, in order."""

Score = Callable[[Sequence[tuple[str, str]]], list[float]]
"""(prompt, completion) pairs -> log p(completion | prompt) of each in nats, summed, in order."""


def answering_prompt(question: str) -> str:
    """Asks for an answer and an explanation; the completion is `\\n{answer}\\n{explanation}`."""
    return f"Question: {question}\nAnswer and explanation:"


def explaining_prompt(question: str, answer: str) -> str:
    """Gives the answer and asks for an explanation; the completion is ` {explanation}`."""
    return f"Question: {question}\nAnswer: {answer}\nExplanation:"


def reading_prompt(question: str, answer: str, explanation: str) -> str:
    """The answering prompt after a context that states the answer and explains it."""
    return f"{answer}\n{explanation}\n\n{answering_prompt(question)}"


def answering_completion(answer: str, explanation: str) -> str:
    """What should follow `answering_prompt`."""
    return f"\n{answer}\n{explanation}"


def explaining_completion(explanation: str) -> str:
    """What should follow `explaining_prompt`."""
    return f" {explanation}"
