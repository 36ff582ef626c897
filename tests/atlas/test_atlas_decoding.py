import pytest

from fusion_lens.atlas import CHECKPOINT, CONTRASTS
from fusion_lens.atlas.decoding import load_scorer
from fusion_lens.contrasts import load_pairs
from fusion_lens.prompts import continuation, tokenize
from fusion_lens.teacher_forcing import Text, log_probs


def test_the_scorer_says_what_the_engine_says_in_order_and_whatever_stands_beside(atlas):
    score = load_scorer(CHECKPOINT)
    pairs = load_pairs(CONTRASTS / "facts.jsonl")[::90]
    texts = [(pair.prompt, text) for pair in pairs for text in (pair.right, pair.wrong)]
    read = [tokenize(atlas, prompt) for prompt, _ in texts]
    engine = log_probs(
        atlas,
        [Text(p, continuation(atlas, p, text)) for p, (_, text) in zip(read, texts, strict=True)],
    )
    assert score(texts) == pytest.approx(engine, abs=2e-3)
    assert [score([text])[0] for text in texts[:4]] == pytest.approx(score(texts)[:4], abs=1e-4)
