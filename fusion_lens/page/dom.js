// Elements are made here and nowhere else: every text goes in as text, never as HTML.

const byId = (id) => document.getElementById(id);

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (name === "style") {
      for (const [key, own] of Object.entries(value)) element.style.setProperty(key, own);
    } else {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

const el = (tag, properties = {}, ...children) =>
  fill(document.createElement(tag), properties, children);

const svg = (tag, properties = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);

function scrolling(label, ...children) {
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, ...children);
}

// A number, or a dash that says why there is none.
function shown(value, format) {
  if (value === null || value === undefined) return el("span", { class: "none", title: "unscored" }, "–");
  return document.createTextNode(format(value));
}

const MINUS = "−";
const fixed = (digits) => (value) => value.toFixed(digits).replace(/^-(?=0\.?0*$)/, "").replace("-", MINUS);
const signed = (digits) => (value) => {
  const text = fixed(digits)(value);
  return text.startsWith(MINUS) || Number(text) === 0 ? text : `+${text}`;
};
const percent = (value) => `${fixed(Math.abs(value) < 0.1 && value !== 0 ? 1 : 0)(value * 100)} %`;
// three significant digits, also of a perplexity of 123456
function figures3(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace("-", MINUS);
  return fixed(Math.max(0, 2 - Math.floor(Math.log10(size))))(value);
}
const yesNo = (value) => (value ? "yes" : "no");
const counted = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

function debounced(listener, milliseconds) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(listener, milliseconds);
  };
}
