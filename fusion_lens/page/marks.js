// Marks inside texts: words that differ, tokens that were read or steered, tokens made likelier.

// Shift at which the colour is full, in nats: e^3 is twenty times as likely.
const FULL_SHIFT = 3;

// Which words of `after` are in no longest common subsequence with `before`.
function newWords(before, after) {
  const n = before.length;
  const m = after.length;
  const longest = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1));
  for (let i = n - 1; i >= 0; i -= 1) {
    for (let j = m - 1; j >= 0; j -= 1) {
      longest[i][j] =
        before[i] === after[j]
          ? longest[i + 1][j + 1] + 1
          : Math.max(longest[i + 1][j], longest[i][j + 1]);
    }
  }
  const fresh = new Set();
  for (let i = 0, j = 0; j < m; ) {
    if (i < n && before[i] === after[j]) {
      i += 1;
      j += 1;
    } else if (i < n && longest[i + 1][j] >= longest[i][j + 1]) {
      i += 1;
    } else {
      fresh.add(j);
      j += 1;
    }
  }
  return fresh;
}

const LONGEST_COMPARED = 1500;

// A completion with the words marked that another text does not have there.
function marked(text, against) {
  if (against === null || against === text) return [text];
  const parts = text.split(/(\s+)/);
  const words = parts.filter((_, i) => i % 2 === 0);
  const others = against.trim().split(/\s+/);
  if (words.length > LONGEST_COMPARED || others.length > LONGEST_COMPARED) return [text];
  const fresh = newWords(others, words);
  return parts.map((part, i) =>
    i % 2 === 0 && part && fresh.has(i / 2) ? el("mark", {}, part) : part,
  );
}

// Line breaks and tabs are seen; a leading space is a gap.
const visible = (token) =>
  token.replaceAll("\r", "␍").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";

function markedTokens(text, vocabulary, name) {
  const chosen = new Set(text.marked);
  return el(
    "p",
    { class: "tokens" },
    text.tokens.map((place, i) =>
      el(
        "span",
        {
          class: chosen.has(i) ? "token chosen" : "token",
          title: `position ${i}${chosen.has(i) ? `, ${name}` : ""}`,
        },
        visible(vocabulary[place]),
      ),
    ),
  );
}

const share = (shift) => Math.min(1, Math.abs(shift) / FULL_SHIFT);

function shiftedToken(token, steered, unsteered) {
  const shift = steered - unsteered;
  const title =
    `${JSON.stringify(token)}: log p ${fixed(2)(steered)} steered, ${fixed(2)(unsteered)} unsteered, ` +
    `change ${signed(2)(shift)} nats`;
  return el(
    "span",
    {
      class: `shifted ${shift < 0 ? "down" : "up"}`,
      style: { "--share": `${Math.round(100 * share(shift))}%` },
      title,
    },
    el("span", { class: "token" }, visible(token)),
    el("span", { class: "shift" }, Math.abs(shift) < 0.05 ? "0" : signed(1)(shift)),
  );
}

function shiftLegend() {
  const steps = [-3, -2, -1, 0, 1, 2, 3];
  return el(
    "p",
    { class: "legend" },
    "less likely ",
    steps.map((step) =>
      el(
        "span",
        { class: `shifted ${step < 0 ? "down" : "up"}`, style: { "--share": `${Math.round(100 * share(step))}%` } },
        el("span", { class: "shift" }, step === 0 ? "0" : signed(0)(step)),
      ),
    ),
    " likelier, in nats (+1 is 2.7 times as likely)",
  );
}
