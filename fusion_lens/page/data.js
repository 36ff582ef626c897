// What lies compressed in the page -> the run: questions, each with its record of every arm.

async function unpack(name) {
  const text = atob(byId(`packed-${name}`).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const unpackJson = async (name) => JSON.parse(await unpack(name));

// A question may be called "constructor".
const own = (content, name) => (Object.hasOwn(content, name) ? content[name] : null);

// Columns -> an object per row.
function rowsOf(columns) {
  const names = Object.keys(columns);
  const rows = [];
  for (let i = 0; i < columns[names[0]].length; i += 1) {
    const row = {};
    for (const name of names) row[name] = columns[name][i];
    rows.push(row);
  }
  return rows;
}

function readRun(table) {
  const questions = rowsOf(table.questions);
  questions.forEach((question, n) => {
    question.number = n;
    question.records = new Map();
  });
  for (const record of rowsOf(table.records)) {
    record.arm = table.arms[record.arm];
    questions[record.question].records.set(record.arm, record);
  }
  return {
    questions,
    arms: table.arms,
    colours: table.colours,
    segments: table.segments,
    main: table.main,
    byId: new Map(questions.map((question) => [question.id, question])),
  };
}

const recordOf = (question, arm) => question.records.get(arm) ?? null;
const unsteeredOf = (question) => recordOf(question, "baseline");
const valueOf = (question, arm, name) => recordOf(question, arm)?.[name] ?? null;

function change(question, arm, name) {
  const now = valueOf(question, arm, name);
  const before = valueOf(question, "baseline", name);
  return now === null || before === null ? null : now - before;
}

const isRight = (record) => record !== null && record.exact_match === 1;
const coeffsText = (record) =>
  Object.entries(record?.coeffs ?? {}).map(([name, value]) => `${name} ${fixed(2)(value)}`).join(", ");

// Case and accents do not matter to a search.
const plain = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();

function searchText(question) {
  question.searched ??= plain(
    [
      ...[question.id, question.question, question.answer, question.topic ?? "", question.subject],
      ...[...question.records.values()].map((record) => record.completion),
    ].join("\n"),
  );
  return question.searched;
}

const ALWAYS = () => true;
const FILTERS = {
  all: ["all questions", ALWAYS],
  right: ["right", (q, arm) => isRight(recordOf(q, arm))],
  wrong: ["wrong", (q, arm) => recordOf(q, arm) !== null && !isRight(recordOf(q, arm))],
  became_right: ["wrong unsteered, right now", (q, arm) => isRight(recordOf(q, arm)) && !isRight(unsteeredOf(q))],
  became_wrong: ["right unsteered, wrong now", (q, arm) => isRight(unsteeredOf(q)) && !isRight(recordOf(q, arm))],
  other_text: ["says something else than unsteered", (q, arm) => valueOf(q, arm, "completion") !== valueOf(q, "baseline", "completion")],
  arms_differ: ["some arms right, some wrong", (q) => new Set([...q.records.values()].map(isRight)).size > 1],
  zero_won: ["zero plan won", (q, arm) => valueOf(q, arm, "zero_won") === true],
  steered: ["a plan steers", (q, arm) => (valueOf(q, arm, "injected_norm") ?? 0) > 0],
  worse: ["objective fell", (q, arm) => (change(q, arm, "objective") ?? 0) < 0],
};

function matching(run, state) {
  const terms = plain(state.search).split(/\s+/).filter(Boolean);
  const [, keeps] = FILTERS[state.filter];
  return run.questions.filter(
    (question) => keeps(question, state.arm) && terms.every((term) => searchText(question).includes(term)),
  );
}

// Unscored values come last, whichever way is sorted.
function sorted(questions, key, descending) {
  const keyed = questions.map((question) => [key(question), question]);
  keyed.sort(([a, first], [b, second]) => {
    if (a === null || b === null) return (a === null) - (b === null) || first.number - second.number;
    const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    return (descending ? -order : order) || first.number - second.number;
  });
  return keyed.map(([, question]) => question);
}
