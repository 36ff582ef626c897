// One question in full: what each arm said, its scores, layers, tokens, features.

const SCORES = [
  ["exact_match", "right (exact match)", yesNo],
  ["contained_match", "gold is contained", yesNo],
  ["overlap", "overlap with gold", fixed(3)],
  ["token_f1", "token F1", fixed(3)],
  ["objective", "objective", signed(3)],
  ["nll", "negative log-likelihood, nats/token", fixed(3)],
  ["perplexity", "perplexity", figures3],
  ["distinct_2", "distinct 2-grams", fixed(2)],
  ["repetition", "repetition", fixed(2)],
  ["transfer_exact_match", "paraphrases right", percent],
  ["transfer_n", "paraphrases asked", String],
  ["neighbours_kept", "neighbours kept", percent],
  ["neighbours_n", "neighbours asked", String],
  ["kl_unrelated", "KL on unrelated text, nats/token", fixed(3)],
  ["label", "judge's label", (label) => label.toLowerCase().replaceAll("_", " ")],
  ["grade", "judge's grade, 1 to 5", figures3],
  ["composite", "half overlap, half grade", fixed(2)],
  ["injected_norm", "norm injected, residual units", figures3],
  ["n_trials", "trials", String],
  ["best_trial", "best trial", String],
  ["zero_won", "zero plan won", yesNo],
  ["tied", "trials tied", yesNo],
  ["margin", "smallest greedy margin, logits", figures3],
  ["ended", "ended by itself", yesNo],
  ["finite", "logits finite", yesNo],
  ["n_not_finite", "trials not finite", String],
  ["donor", "donor of the delta", String],
  ["seconds", "seconds", figures3],
];

// A dot in the arm's colour and its name, which may be broken after an underscore.
const armName = (run, arm) => [
  dot(run, arm),
  el("span", {}, arm.split(/(?<=_)/).flatMap((part, i) => (i ? [el("wbr"), part] : [part]))),
];
const dot = (run, arm) => el("span", { class: "dot", style: { background: run.colours[arm] } });
const section = (title, ...children) => el("section", {}, el("h3", {}, title), ...children);
const note = (...texts) => el("p", { class: "note" }, ...texts);

function facts(pairs) {
  const kept = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return el(
    "dl",
    { class: "facts" },
    kept.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
  );
}

function verdict(record) {
  const right = isRight(record);
  return el("span", { class: right ? "verdict right" : "verdict wrong" }, right ? "✓ right" : "✗ wrong");
}

function plannedText(record) {
  if (!Object.keys(record.coeffs).length) return "nothing was tuned";
  if (record.zero_won) return "the zero plan won: nothing is injected";
  return `coefficients ${coeffsText(record)}`;
}

function said(run, question, arm) {
  const record = recordOf(question, arm);
  const against = arm === "baseline" ? null : (unsteeredOf(question)?.completion.trim() ?? null);
  if (record === null) {
    return el("li", {}, el("h4", {}, armName(run, arm)), note("This arm failed on the question, or was not run."));
  }
  const reason = [record.label?.toLowerCase().replaceAll("_", " "), record.judged].filter(Boolean).join(": ");
  return el(
    "li",
    {},
    el("h4", {}, armName(run, arm), " ", verdict(record)),
    el("p", { class: "completion" }, record.completion.trim() ? marked(record.completion.trim(), against) : el("i", {}, "nothing")),
    note(
      `answer read: ${record.extracted || "none"}`,
      reason ? ` · judge: ${reason}` : " · no judge's label",
      ` · ${plannedText(record)}`,
      record.finite ? "" : " · its logits were not finite",
    ),
  );
}

function scoresTable(run, question) {
  const arms = run.arms.filter((arm) => question.records.has(arm));
  const rows = SCORES.filter(([name]) => arms.some((arm) => valueOf(question, arm, name) !== null));
  return scrolling(
    "Every score of every arm",
    el(
      "table",
      { class: "scores" },
      el("caption", {}, el("span", {}, "Every score of every arm; – is unscored")),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "score"), arms.map((arm) => el("th", { scope: "col" }, armName(run, arm))))),
      el(
        "tbody",
        {},
        rows.map(([name, title, format]) =>
          el(
            "tr",
            {},
            el("th", { scope: "row" }, title),
            arms.map((arm) => el("td", {}, shown(valueOf(question, arm, name), format))),
          ),
        ),
      ),
    ),
  );
}

// Bars over layers, as a picture with a text for those who do not see it.
function bars(title, unit, values, format) {
  const [pitch, left, top, high, below] = [values.length > 14 ? 15 : 30, 46, 28, 96, 36];
  const finite = values.map((value) => (value === null || !Number.isFinite(value) ? 0 : value));
  const most = Math.max(...finite, 0) || 1;
  const width = left + pitch * values.length + 8;
  const every = Math.ceil(values.length / 13);
  const named = values.map((value, layer) => `layer ${layer} ${value === null ? "unscored" : format(value)}`);
  const y = (value) => top + high * (1 - value / most);
  return el(
    "figure",
    { class: "bars" },
    el("figcaption", {}, title),
    scrolling(
      title,
      svg(
        "svg",
        { width, height: top + high + below, role: "img", "aria-label": `${title}: ${named.join(", ")}` },
        [0, 0.5, 1].map((part) => [
          svg("line", { x1: left, x2: width - 8, y1: y(part * most), y2: y(part * most), class: "grid" }),
          svg("text", { x: left - 6, y: y(part * most) + 4, "text-anchor": "end" }, part ? format(part * most) : "0"),
        ]).flat(),
        finite.map((value, layer) =>
          svg(
            "rect",
            { x: left + layer * pitch + pitch * 0.15, width: pitch * 0.7, y: y(value), height: top + high - y(value), class: "bar-mark" },
            svg("title", {}, named[layer]),
          ),
        ),
        values.map((_, layer) =>
          layer % every ? null : svg("text", { x: left + (layer + 0.5) * pitch, y: top + high + 15, "text-anchor": "middle" }, String(layer)),
        ),
        svg("text", { x: left, y: top + high + 31 }, "layer"),
        svg("text", { x: 0, y: 12 }, unit),
      ),
    ),
  );
}

// Arms by layers: each segment's coefficient over the layers it covers.
function coefficients(run, question, nLayers) {
  const arms = run.arms.filter((arm) => Object.keys(recordOf(question, arm)?.coeffs ?? {}).length);
  if (!arms.length) return note("No arm of this question was tuned, so there is no coefficient.");
  const most = Math.max(1, ...arms.flatMap((arm) => Object.values(recordOf(question, arm).coeffs)));
  return scrolling(
    "Coefficients by layer",
    el(
      "table",
      { class: "coefficients" },
      el("caption", {}, el("span", {}, "Coefficient of every layer: how many times the delta is added")),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "layer"), Array.from({ length: nLayers }, (_, l) => el("th", { scope: "col" }, String(l))))),
      el("tbody", {}, arms.map((arm) => el("tr", {}, el("th", { scope: "row" }, armName(run, arm)), coefficientCells(run, recordOf(question, arm), nLayers, most)))),
    ),
  );
}

function coefficientCells(run, record, nLayers, most) {
  const spans = Object.entries(record.coeffs)
    .map(([name, value]) => ({ name, value, layers: run.segments[name] }))
    .filter(({ layers }) => layers)
    .sort((a, b) => a.layers[0] - b.layers[0]);
  if (!spans.length) return [el("td", { colspan: nLayers }, coeffsText(record))];
  const cells = [];
  let layer = 0;
  for (const { name, value, layers } of spans) {
    if (layers[0] > layer) cells.push(el("td", { colspan: layers[0] - layer, title: "not steered" }));
    cells.push(
      el(
        "td",
        { colspan: layers[1] - layers[0], class: "filled", style: { "--share": `${Math.round((100 * value) / most)}%` }, title: `${name}: layers ${layers[0]} to ${layers[1] - 1}` },
        name.startsWith("segment_") ? "" : `${name} `,
        fixed(2)(value),
      ),
    );
    [, layer] = layers;
  }
  if (layer < nLayers) cells.push(el("td", { colspan: nLayers - layer, title: "not steered" }));
  return cells;
}

function layersSection(run, question, detail) {
  const relative = detail.delta_norms.map((norm, l) => (detail.base_norms[l] ? norm / detail.base_norms[l] : null));
  return section(
    "Layers",
    el(
      "div",
      { class: "charts" },
      bars("Norm of the delta", "residual units", detail.delta_norms, figures3),
      bars("Norm of the delta over the norm of the question's mean", "ratio", relative, figures3),
      detail.generic_share ? bars("Share that other questions' mean delta explains", "of the squared norm", detail.generic_share, percent) : null,
    ),
    detail.generic_share ? null : note("No generic share: it needs other questions."),
    coefficients(run, question, detail.delta_norms.length),
  );
}

function tracedText(run, trace, vocabulary) {
  const tokens = trace.tokens.map((place) => vocabulary[place]);
  const table = el("details", {}, el("summary", {}, `Log-probabilities of ${trace.arm} as a table`));
  table.addEventListener("toggle", () => table.open && table.children.length === 1 && table.append(traceTable(trace, tokens)));
  const total = trace.steered.reduce((sum, value, i) => sum + value - trace.unsteered[i], 0);
  return el(
    "div",
    { class: "trace" },
    el("h4", {}, armName(run, trace.arm), el("span", { class: "note" }, ` ${signed(1)(total)} nats in all`)),
    el("p", { class: "tokens" }, tokens.map((token, i) => shiftedToken(token, trace.steered[i], trace.unsteered[i]))),
    table,
  );
}

function traceTable(trace, tokens) {
  const head = ["token", "log p steered", "log p unsteered", "change, nats"];
  return scrolling(
    `Log-probabilities of ${trace.arm}`,
    el(
      "table",
      { class: "scores" },
      el("caption", {}, el("span", {}, `What ${trace.arm} wrote, token by token`)),
      el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))),
      el(
        "tbody",
        {},
        tokens.map((token, i) =>
          el(
            "tr",
            {},
            el("th", { scope: "row", class: "code" }, visible(token)),
            [trace.steered[i], trace.unsteered[i]].map((value) => el("td", {}, fixed(3)(value))),
            el("td", {}, signed(3)(trace.steered[i] - trace.unsteered[i])),
          ),
        ),
      ),
    ),
  );
}

function tokensSection(run, detail, vocabulary) {
  const [read, steered] = [detail.captured.marked.length, detail.steered.marked.length];
  return section(
    "Tokens",
    el("h4", {}, "The reference text"),
    note(`${counted(read, "token")} marked: the mean of the residual stream is taken there.`),
    markedTokens(detail.captured, vocabulary, "captured"),
    el("h4", {}, "The prompt"),
    note(steered ? `${counted(steered, "token")} marked: a plan injects there, and at what is written after.` : "No position is marked: no plan injects anything into the prompt."),
    markedTokens(detail.steered, vocabulary, "steered"),
    el("h4", {}, "What steering made likelier"),
    detail.traces.length
      ? [note("Each arm's own completion, token by token: log-probability under its plan minus without it."), shiftLegend(), detail.traces.map((trace) => tracedText(run, trace, vocabulary))]
      : note("No arm has a plan that injects anything, or none could be read token by token."),
  );
}

function featuresSection(detail) {
  if (!detail.features.length) {
    return section("Features", note("None: the run had no dictionary, or the method's plan injects nothing here (the zero plan won)."));
  }
  const most = Math.max(...detail.features.map((each) => Math.abs(each.effect))) || 1;
  const head = ["layer", "feature", "label", "effect, residual units", "share of the injected squared norm"];
  return section(
    "Features",
    scrolling(
      "Features",
      el(
        "table",
        { class: "features" },
        el("caption", {}, el("span", {}, `Sparse features that make up what ${detail.features_of} injects, the largest first`)),
        el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))),
        el("tbody", {}, detail.features.map((each) => featureRow(each, most))),
      ),
    ),
  );
}

function featureRow(each, most) {
  const size = `${Math.round((100 * Math.abs(each.effect)) / most)}%`;
  return el(
    "tr",
    {},
    el("td", {}, each.layer === null ? "all" : String(each.layer)),
    el("td", {}, String(each.feature)),
    el("th", { scope: "row" }, each.label || "unlabelled"),
    el("td", {}, el("span", { class: `effect ${each.effect < 0 ? "down" : "up"}`, style: { "--size": size } }, signed(2)(each.effect))),
    el("td", {}, shown(each.share, percent)),
  );
}

function renderDetail(run, question, detail, vocabulary) {
  const given = [
    ["gold", question.answer],
    ["explanation", question.explanation],
    ["topic", question.topic],
    ["answer type", question.answer_type],
    ["subject", question.subject],
    ["id", question.id],
  ];
  return [
    el("h2", { id: "detail-title" }, question.question),
    facts(given),
    section(
      "What each arm said",
      note("Words that the unsteered completion does not have are marked."),
      el("ol", { class: "said" }, run.arms.map((arm) => said(run, question, arm))),
    ),
    section("Scores", scoresTable(run, question)),
    ...(detail
      ? [layersSection(run, question, detail), tokensSection(run, detail, vocabulary), featuresSection(detail)]
      : [section("Layers, tokens, features", note("This run kept none of this question: it failed, or the run was interrupted or is older than details.jsonl."))]),
  ];
}
