"""A tuned plan -> sliders in a notebook, and what the model writes wherever they stand.

A change runs one row through the engine, as a trial of the search, and its scorer; what was seen
once is kept. The coefficients are all that can be changed: vectors, positions and prompt are the
search's. Needs ipywidgets (the extra `notebook`), which is imported when a panel is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any, final

from fusion_lens.errors import ConfigError, MissingExtraError
from fusion_lens.generation import generate
from fusion_lens.graders import Graded
from fusion_lens.models import HookedModel
from fusion_lens.perplexity import PerplexityModel
from fusion_lens.plans import Plan, Segment
from fusion_lens.preparation import TuningConfig, with_engine_shape
from fusion_lens.scoring import Scorer
from fusion_lens.search import SearchConfig
from fusion_lens.tuning import AnyJob, TunedPlan

_NOT_FINITE = (
    "the model's logits are not finite at these coefficients: the text ends there, and is "
    "unscored; lower them."
)


def steering_panel(
    model: HookedModel,
    tuned: TunedPlan | AnyJob,
    *,
    config: TuningConfig | None = None,
    fluency: PerplexityModel | None = None,
) -> SteeringPanel:
    """Sliders over the search's range that begin at the chosen coefficients; below them the steered
    completion beside the unsteered one, and their scores.

    A `Job`, a prepared question and segments that no search has seen, begins at zero and takes the
    `config` it was prepared with; a tuned plan has its own. What a search sought beside the
    coefficients stays as it chose it. `fluency` is the one `tune` was given.

    Raises:
        MissingExtraError: if ipywidgets is not installed.
        ConfigError: if a tuned plan is given a `config`, or the metrics are the published ones and
            there is no `fluency`.
        PlanError: if the plan belongs to another model.
    """
    if not isinstance(tuned, TunedPlan):
        config = with_engine_shape(
            model, [tuned.prepared.question], config or TuningConfig(), n_rows=1
        )
        return SteeringPanel(_Probe(model, tuned, config, fluency))
    if config is not None:
        raise ConfigError(
            "a tuned plan is shown with the config it was tuned with, but got another; leave "
            "config out."
        )
    probe = _Probe(model, tuned.job, tuned.config, fluency, tuned.tuned.best.extra)
    return SteeringPanel(probe, tuned)


class _Probe:
    """Coefficients -> what the model writes under them, scored, each once; knows no widget."""

    def __init__(
        self,
        model: HookedModel,
        job: AnyJob,
        config: TuningConfig,
        fluency: PerplexityModel | None,
        extra: Mapping[str, float | int] | None = None,
    ) -> None:
        self.job = job
        self.config = config
        self._extra = dict(extra or {})
        self._model = model
        self._score = Scorer(model, config, fluency=fluency)
        self._known: dict[tuple[float, ...], Graded] = {}

    def plan(self, coeffs: Mapping[str, float]) -> Plan:
        return self.job.plan(self._extra | dict(coeffs), self.config)

    def __call__(self, coeffs: Mapping[str, float]) -> Graded:
        key = tuple(coeffs.values())
        if key not in self._known:
            row = self.job.prepared.row(self.config, self.plan(coeffs))
            written = generate(self._model, [row], self.config.generation)
            (self._known[key],) = self._score([self.job.prepared], written)
        return self._known[key]


@final
class SteeringPanel:
    """What `steering_panel` makes. A notebook shows it; `box` is the widget itself, for a layout of
    one's own. `sliders` has a slider per segment name, `buttons` what sets them all at once,
    `message` tells what is being done or went wrong, `output` is the table."""

    def __init__(self, probe: _Probe, tuned: TunedPlan | None = None) -> None:
        try:
            import ipywidgets
        except ImportError as error:
            raise MissingExtraError("ipywidgets", "notebook") from error
        self._probe = probe
        self._tuned = tuned
        self._moving = False
        segments = probe.job.segments
        self._zero = dict.fromkeys((segment.name for segment in segments), 0.0)
        start = self._zero if tuned is None else tuned.tuned.best.coeffs
        self._unsteered = probe(self._zero)
        low, high = _range(probe.job.search(probe.config), [*start.values()])
        self.sliders = {
            segment.name: ipywidgets.FloatSlider(
                value=start[segment.name],
                min=low,
                max=high,
                step=(high - low) / 300,
                description=_label(segment),
                tooltip=f"coefficient of {_label(segment)}",
                continuous_update=False,
                readout_format=".3f",
                style={"description_width": "14em"},
                layout={"width": "40em"},
            )
            for segment in segments
        }
        places = {"Zero": ("steer nowhere", self._zero)}
        if tuned is not None:
            places = {"Reset to tuned": ("the coefficients the search chose", start)} | places
        self.buttons = {
            name: ipywidgets.Button(description=name, tooltip=tooltip)
            for name, (tooltip, _) in places.items()
        }
        self.message = ipywidgets.HTML()
        self.output = ipywidgets.HTML()
        self.box = ipywidgets.VBox(
            [
                *self.sliders.values(),
                ipywidgets.HBox([*self.buttons.values()]),
                self.message,
                self.output,
            ]
        )
        self._show()
        for slider in self.sliders.values():
            slider.observe(self._follow, names="value")
        for name, (_, coeffs) in places.items():
            self.buttons[name].on_click(lambda _, coeffs=coeffs: self._move_to(coeffs))

    @property
    def coeffs(self) -> dict[str, float]:
        """Where the sliders stand."""
        return {name: float(slider.value) for name, slider in self.sliders.items()}

    @property
    def plan(self) -> Plan:
        """The plan of the sliders, to save or to use elsewhere.

        Raises:
            PlanError: if a coefficient is too large.
        """
        return self._probe.plan(self.coeffs)

    @property
    def graded(self) -> Graded:
        """What the model writes at the sliders, scored."""
        return self._probe(self.coeffs)

    def _move_to(self, coeffs: Mapping[str, float]) -> None:
        self._moving = True
        try:
            for name, coeff in coeffs.items():
                self.sliders[name].value = coeff
        finally:
            self._moving = False
        self._follow()

    def _follow(self, _: object = None) -> None:
        if self._moving:
            return
        self.message.value = '<p role="status">writing ...</p>'
        # Jupyter drops what an observer raises, and the last scores would pass for these sliders'
        try:
            self._show()
        except (Exception, KeyboardInterrupt) as error:
            self.output.value = ""
            self.message.value = _alert(f"{type(error).__name__}: {error}".removesuffix(": "))

    def _show(self) -> None:
        steered, norm = self.graded, self.plan.injected_norm
        question = self._probe.job.prepared.question
        table = steered.beside(self._unsteered, question.question, (f"gold: {question.answer}",))
        self.output.value = replace(
            table, rows=(*table.rows, ("injected norm", "0.00", f"{norm:.2f}"))
        ).to_html()
        self.message.value = "".join(_alert(note) for note in self._notes(steered))

    def _notes(self, steered: Graded) -> list[str]:
        notes = [] if steered.completion.finite else [_NOT_FINITE]
        if self._tuned is not None and self.coeffs == self._tuned.tuned.best.coeffs:
            found = self._tuned.best.objective
            if not math.isclose(steered.objective, found, abs_tol=1e-4):
                notes.append(
                    f"the search saw an objective of {found:+.3f} at these coefficients; give the "
                    "model and the fluency it ran with."
                )
        return notes

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.box._repr_mimebundle_(**options)


def _range(search: SearchConfig, start: Sequence[float]) -> tuple[float, float]:
    """Of the search, widened to zero and to where the sliders begin."""
    low, high = search.low, search.high
    if search.parametrisation == "alpha_gamma":
        low, high = 0.0, 1.0
    return min(low, 0.0, *start), max(high, 0.0, *start)


def _label(segment: Segment) -> str:
    last = segment.stop - 1
    layers = f"layer {last}" if segment.start == last else f"layers {segment.start} to {last}"
    return f"{segment.name}, {layers}"


def _alert(text: str) -> str:
    return f'<p role="alert"><strong>{escape(text)}</strong></p>'
