// The table of questions: search, filter, sort, pages.

const PER_PAGE = 50;

const text = (value) => (value === null ? shown(null) : el("span", { class: "clamp", title: value }, value));

function rightCell(question, arm) {
  const now = recordOf(question, arm);
  if (now === null) return shown(null);
  return verdict(now);
}

function openButton(question) {
  return el("button", { type: "button", class: "open", "data-number": question.number }, question.question);
}

// Title, sort key, cell.
const columnsOf = (arm) => [
  ["id", (q) => q.id, (q) => [el("span", { class: "id" }, q.id), q.topic ? el("span", { class: "topic" }, q.topic) : null]],
  ["question", (q) => q.question, openButton],
  ["gold", (q) => q.answer, (q) => text(q.answer)],
  ["unsteered", (q) => valueOf(q, "baseline", "completion")?.trim() ?? null, (q) => text(valueOf(q, "baseline", "completion")?.trim() ?? null)],
  [arm === "baseline" ? "baseline" : arm, (q) => valueOf(q, arm, "completion")?.trim() ?? null, (q) => text(valueOf(q, arm, "completion")?.trim() ?? null), "steered"],
  ["coefficients", (q) => valueOf(q, arm, "injected_norm"), (q) => coefficientsCell(recordOf(q, arm))],
  ["right", (q) => valueOf(q, arm, "exact_match"), (q) => rightCell(q, arm)],
  ["overlap", (q) => valueOf(q, arm, "overlap"), (q) => shown(valueOf(q, arm, "overlap"), fixed(2))],
  ["objective", (q) => valueOf(q, arm, "objective"), (q) => shown(valueOf(q, arm, "objective"), signed(2))],
  ["change", (q) => change(q, arm, "objective"), (q) => shown(change(q, arm, "objective"), signed(2)), "change"],
  ["perplexity", (q) => valueOf(q, arm, "perplexity"), (q) => shown(valueOf(q, arm, "perplexity"), figures3)],
];
const NUMBERS = new Set(["overlap", "objective", "change", "perplexity"]);
const CHANGE_HELP = "objective minus the unsteered model's";

function coefficientsCell(record) {
  if (record === null) return shown(null);
  const entries = Object.entries(record.coeffs);
  if (!entries.length) return el("span", { class: "none", title: "nothing was tuned" }, "–");
  if (record.zero_won) return el("span", { class: "muted" }, "zero plan");
  const many = entries.length > 4 ? [...entries.slice(0, 3), ["…", null]] : entries;
  return many.map(([name, value]) => el("span", { class: "coeff" }, value === null ? name : `${name} ${fixed(2)(value)}`));
}

function questionTable(run, open) {
  const table = byId("table");
  const [head, body] = [table.tHead.rows[0], table.tBodies[0]];
  const state = { search: "", filter: "all", arm: run.main, sort: null, descending: false, page: 0 };
  let found = run.questions;

  function header([title, , , name = title], place) {
    const on = state.sort === place;
    const arrow = on ? (state.descending ? " ↓" : " ↑") : "";
    return el(
      "th",
      { scope: "col", role: "columnheader", "aria-sort": on ? (state.descending ? "descending" : "ascending") : "none", class: NUMBERS.has(name) ? "number" : `c-${name}` },
      el("button", { type: "button", title: name === "change" ? CHANGE_HELP : null, on: { click: () => sortBy(place) } }, title + arrow),
    );
  }

  function row(question, columns) {
    return el(
      "tr",
      { role: "row", "data-number": question.number },
      columns.map(([title, , cell, name = title]) =>
        el("td", { role: "cell", "data-label": title, class: NUMBERS.has(name) ? "number" : `c-${name}` }, cell(question)),
      ),
    );
  }

  function draw() {
    const columns = columnsOf(state.arm);
    const focused = [...head.children].findIndex((cell) => cell.contains(document.activeElement));
    const first = state.page * PER_PAGE;
    const pageRows = found.slice(first, first + PER_PAGE);
    head.replaceChildren(...columns.map(header));
    if (focused >= 0) head.children[focused].firstChild.focus();
    body.replaceChildren(...pageRows.map((question) => row(question, columns)));
    byId("count").textContent = `${counted(found.length, "question")} of ${run.questions.length.toLocaleString("en")} shown`;
    byId("page").textContent = found.length ? `${first + 1}–${first + pageRows.length} of ${found.length.toLocaleString("en")}` : "";
    byId("earlier").disabled = state.page === 0;
    byId("later").disabled = first + PER_PAGE >= found.length;
    document.querySelector(".pager").hidden = found.length <= PER_PAGE;
  }

  function update(changed) {
    Object.assign(state, { page: 0 }, changed);
    found = matching(run, state);
    if (state.sort !== null) found = sorted(found, columnsOf(state.arm)[state.sort][1], state.descending);
    draw();
  }

  function sortBy(place) {
    const again = state.sort === place;
    if (again && state.descending) update({ sort: null, descending: false });
    else update({ sort: place, descending: again });
  }

  function turn(pages) {
    state.page += pages;
    draw();
    table.scrollIntoView({ block: "start" });
  }

  // The row of a question, on whichever page it is: where the focus goes when its detail closes.
  function focus(question) {
    const place = found.indexOf(question);
    if (place < 0) return byId("search").focus();
    if (Math.floor(place / PER_PAGE) !== state.page) {
      state.page = Math.floor(place / PER_PAGE);
      draw();
    }
    return body.querySelector(`button[data-number="${question.number}"]`).focus();
  }

  function choices(select, pairs, chosen) {
    select.replaceChildren(...pairs.map(([value, title]) => el("option", { value, selected: value === chosen }, title)));
  }

  choices(byId("arm"), run.arms.map((arm) => [arm, arm]), state.arm);
  choices(byId("filter"), Object.entries(FILTERS).map(([name, [title]]) => [name, title]), state.filter);
  byId("search").addEventListener("input", debounced(() => update({ search: byId("search").value }), 120));
  byId("arm").addEventListener("change", () => update({ arm: byId("arm").value }));
  byId("filter").addEventListener("change", () => update({ filter: byId("filter").value }));
  byId("earlier").addEventListener("click", () => turn(-1));
  byId("later").addEventListener("click", () => turn(1));
  body.addEventListener("click", (event) => {
    const clicked = event.target.closest("tr");
    if (clicked && !String(getSelection())) open(run.questions[Number(clicked.dataset.number)]);
  });
  update({});
  return { focus, found: () => found };
}
