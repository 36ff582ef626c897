from __future__ import annotations

import asyncio
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import strong_plan
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    Model,
    ModelOutput,
    get_model,
)
from inspect_ai.tool import ToolInfo
from test_generation import overflowing_plan
from test_messages import TEMPLATE

from fusion_lens import inspect_models, inspect_tasks
from fusion_lens.decoding import GenerationConfig, Row
from fusion_lens.errors import (
    ConfigError,
    ContextLengthError,
    MissingExtraError,
    ModelError,
    PlanError,
)
from fusion_lens.gatherer import one_at_a_time
from fusion_lens.generation import generate
from fusion_lens.models import HookedModel
from fusion_lens.plan_files import save_plan
from fusion_lens.plans import Plan
from fusion_lens.prompts import tokenize

TEXTS = ("Who wrote the red book?", "When?", "When was Tom born in the harbour?")
SHAPE = {"slots": 4, "cache_length": 64}
TOGETHER = {"batch_size": 3, "window": 60.0}  # a batch of three, however busy the machine is
LIMIT = GenerateConfig(max_tokens=6)


@pytest.fixture(scope="module")
def plan(tiny: HookedModel) -> Plan:
    return strong_plan(tiny)


@pytest.fixture(scope="module")
def plan_file(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plans") / "plan.safetensors"
    save_plan(plan, path)
    return str(path)


@pytest.fixture(scope="module")
def chat_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    for path in tiny_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def opened() -> Iterator[Any]:
    """`get_model`, whose threads end with the test."""
    models: list[Model] = []

    def open_model(folder: Path, **model_args: Any) -> Model:
        models.append(get_model(f"fusion_lens/{folder}", memoize=False, **model_args))
        return models[-1]

    yield open_model
    for model in models:
        model.api.close()


def ask(model: Model, inputs: Sequence[Any], config: GenerateConfig = LIMIT) -> list[Any]:
    """All at once: outputs, or what was raised."""

    async def answers() -> list[Any]:
        asked = [model.generate(each, config=config) for each in inputs]
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(answers())


def ask_one(model: Model, input: Any, **config: Any) -> ModelOutput:
    (answer,) = ask(model, [input], GenerateConfig(**{"max_tokens": 6, **config}))
    if isinstance(answer, BaseException):
        raise answer
    assert isinstance(answer, ModelOutput)
    return answer


def written(model: HookedModel, plan: Plan | None) -> list[str]:
    """What the package itself writes to the three texts."""
    rows = [Row(tokenize(model, text), plan) for text in TEXTS]
    return [
        done.text for done in generate(model, rows, GenerationConfig(max_new_tokens=6, **SHAPE))
    ]


def test_what_is_asked_at_once_is_one_batch_of_what_generate_writes(
    tiny, tiny_folder, plan, plan_file, opened, batches
) -> None:
    steered = opened(tiny_folder, plan=plan_file, scale=0.5, **SHAPE, **TOGETHER)
    answers = ask(steered, TEXTS)
    assert batches == [3]
    assert [answer.completion for answer in answers] == written(tiny, plan * 0.5)
    steered = opened(tiny_folder, plan=plan_file, scale=0.5, **SHAPE)
    assert [ask_one(steered, text).completion for text in TEXTS] == written(tiny, plan * 0.5)
    assert batches == [3, 1, 1, 1]
    plain = ask(opened(tiny_folder, **SHAPE), TEXTS)
    assert [answer.completion for answer in plain] == written(tiny, None)
    assert written(tiny, None) != written(tiny, plan * 0.5)


def test_a_batch_has_at_most_its_size(tiny_folder, opened, batches) -> None:
    model = opened(tiny_folder, batch_size=2, window=60.0)
    ask(model, (*TEXTS, TEXTS[0]))
    assert batches == [2, 2]
    assert model.api.max_connections() == 2


def test_models_opened_alike_are_opened_once(tiny_folder, plan_file, opened) -> None:
    steered, plain = opened(tiny_folder, plan=plan_file), opened(tiny_folder)
    other = opened(tiny_folder, dtype="float64")
    assert steered.api.model is plain.api.model
    assert other.api.model is not plain.api.model
    assert steered.api.connection_key() != plain.api.connection_key()


def test_usage_and_stop_reason_are_what_happened(atlas, opened) -> None:
    model = opened(Path("atlas"))
    text = "Question: When was Bren Aldack born?\nAnswer and explanation:"
    (done,) = generate(atlas, [Row(tokenize(atlas, text))])
    whole = ask_one(model, text, max_tokens=48)
    assert (whole.completion, whole.stop_reason) == (done.text, "stop")
    assert whole.usage is not None
    assert whole.usage.input_tokens == len(tokenize(atlas, text).tokens)
    assert whole.usage.output_tokens == len(done.tokens)
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    assert whole.message.source == "generate"
    assert whole.time is not None
    assert ask_one(model, text, max_tokens=2).stop_reason == "max_tokens"
    assert ask_one(model, text, stop_seqs=[" "]).completion == done.text.split(" ")[0]
    assert model.api.max_tokens() == 256


def test_a_seed_is_kept_and_without_one_samples_differ(tiny_folder, opened) -> None:
    model = opened(tiny_folder)
    first, again = (ask_one(model, "When?", temperature=2.0, seed=5) for _ in range(2))
    assert first.completion == again.completion
    assert first.metadata == {"seed": 5}
    drawn = ask(model, ["When?"] * 4, GenerateConfig(temperature=2.0, max_tokens=6))
    assert len({answer.completion for answer in drawn}) > 1
    seeds = [answer.metadata["seed"] for answer in drawn]
    assert len(set(seeds)) == 4
    replayed = ask_one(model, "When?", temperature=2.0, seed=seeds[0])
    assert replayed.completion == drawn[0].completion
    assert ask_one(model, "When?").metadata is None


CONVERSATION: list[ChatMessage] = [
    ChatMessageSystem(content="Be brief."),
    ChatMessageUser(content="Who?"),
]


def test_messages_go_through_the_chat_template_of_a_tokenizer_that_has_one(
    tiny, tiny_folder, chat_folder, opened
) -> None:
    def says(text: str) -> str:
        (done,) = generate(
            tiny, [Row(tokenize(tiny, text))], GenerationConfig(max_new_tokens=6, **SHAPE)
        )
        return done.text

    talked = "<s>system: Be brief.</s><s>user: Who?</s><s>assistant: "
    plainly = "Be brief.\n\nWho?"
    model = opened(chat_folder, **SHAPE)
    assert ask_one(model, CONVERSATION).completion == says(talked)
    begun = [*CONVERSATION, ChatMessageAssistant(content="Ada")]
    assert ask_one(model, begun).completion == says(talked + "Ada")
    as_it_is = opened(chat_folder, chat=False, **SHAPE)
    assert ask_one(as_it_is, CONVERSATION).completion == says(plainly)
    assert ask_one(opened(tiny_folder, **SHAPE), CONVERSATION).completion == says(plainly)
    assert says(talked) != says(plainly)
    with pytest.raises(ConfigError, match="chat=true needs a tokenizer with a chat template"):
        opened(tiny_folder, chat=True)


def test_a_request_can_bring_the_plan_of_its_own(
    tiny, tiny_folder, plan, plan_file, opened, batches
) -> None:
    model = opened(tiny_folder, **SHAPE, batch_size=2, window=60.0)

    async def both() -> list[ModelOutput]:
        own = LIMIT.merge(GenerateConfig(extra_body={"plan": plan_file}))
        return list(
            await asyncio.gather(
                model.generate(TEXTS[0], config=own), model.generate(TEXTS[0], config=LIMIT)
            )
        )

    steered, plain = asyncio.run(both())
    assert batches == [2]
    assert steered.completion == written(tiny, plan)[0]
    assert plain.completion == written(tiny, None)[0]
    taken = opened(tiny_folder, plan=plan_file)
    with pytest.raises(ConfigError, match=r"one plan must steer a reply, but the model has .*plan"):
        ask_one(taken, "When?", extra_body={"plan": plan_file})
    with pytest.raises(ConfigError, match=r"extra_body must be .* has the keys top_a"):
        ask_one(model, "When?", extra_body={"top_a": 1})
    with pytest.raises(PlanError, match="must be a readable plan file"):
        ask_one(opened(tiny_folder), "When?", extra_body={"plan": "nowhere.safetensors"})


def test_a_plan_of_another_model_is_refused_when_it_is_opened(
    other_folder, plan_file, opened
) -> None:
    with pytest.raises(PlanError, match="a plan must be used on the model it was made on"):
        opened(other_folder, plan=plan_file)


def test_a_request_that_fails_takes_no_other_with_it(tiny, tiny_folder, opened) -> None:
    model = opened(tiny_folder, **SHAPE)
    first, wrong, last = ask(model, [TEXTS[0], "to " * 300, TEXTS[2]])
    assert isinstance(wrong, ContextLengthError)
    assert [first.completion, last.completion] == [written(tiny, None)[i] for i in (0, 2)]


def test_a_cancelled_request_is_dropped(tiny_folder, opened, batches) -> None:
    model = opened(tiny_folder)

    async def one_given_up() -> ModelOutput:
        with one_at_a_time:
            given_up = asyncio.create_task(model.generate("When?", config=LIMIT))
            kept = asyncio.create_task(model.generate("Who?", config=LIMIT))
            await asyncio.sleep(0.05)
            given_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await given_up
        return await kept

    assert asyncio.run(one_given_up()).usage is not None
    assert batches == [1]


def test_logits_that_are_not_finite_are_told(tiny, tiny_folder, tmp_path, opened) -> None:
    save_plan(overflowing_plan(tiny), tmp_path / "plan.safetensors")
    answer = ask_one(opened(tiny_folder, plan=str(tmp_path / "plan.safetensors")), "When?")
    assert (answer.completion, answer.stop_reason) == ("", "unknown")
    assert answer.error == "the logits were not finite: the text means nothing"


REFUSED: list[dict[str, Any]] = [
    {"top_p": 0.9},
    {"top_k": 5},
    {"num_choices": 2},
    {"logprobs": True},
    {"frequency_penalty": 0.5},
    {"logit_bias": {3: 1.0}},
]


@pytest.mark.parametrize("setting", REFUSED, ids=lambda setting: next(iter(setting)))
def test_a_setting_that_is_not_to_be_had_is_refused(setting, tiny_folder, opened) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=f"a model of fusion_lens has no {name}, but got"):
        ask_one(opened(tiny_folder), "When?", **setting)


def test_a_setting_without_effect_is_none(tiny_folder, opened) -> None:
    model = opened(tiny_folder)
    told = ask_one(model, "When?", top_p=1.0, num_choices=1, logprobs=False)
    assert told.completion == ask_one(model, "When?").completion


def test_tools_and_images_are_refused(tiny_folder, opened) -> None:
    model = opened(tiny_folder)
    tool = ToolInfo(name="look", description="Looks.")
    with pytest.raises(ConfigError, match="calls no tools, but got look"):
        asyncio.run(model.generate("When?", tools=[tool], config=LIMIT))
    dot = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
    seen = ChatMessageUser(content=[ContentImage(image=dot)])
    with pytest.raises(ConfigError, match="reads text alone, but a message holds image"):
        ask_one(model, [seen])


def test_an_argument_that_is_not_known_and_a_model_that_is_not_there_are_refused(
    tiny_folder, opened
) -> None:
    with pytest.raises(ConfigError, match="plon is no known field"):
        opened(tiny_folder, plon="plan.safetensors")
    with pytest.raises(ConfigError, match="takes neither base_url nor api_key"):
        opened(tiny_folder, base_url="http://127.0.0.1")
    with pytest.raises(ModelError):
        opened(Path("./no-such-folder"))


def test_without_inspect_ai_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai.model", None)
    for module in (inspect_models, inspect_tasks):
        with pytest.raises(MissingExtraError, match=r"pip install 'fusion-lens\[inspect\]'"):
            runpy.run_path(str(module.__file__))
