// Puts the page together: table first, then figures, then details; the address says what is open.

function startTheme() {
  const button = byId("theme");
  const root = document.documentElement;
  const tell = () => {
    const other = isDark() ? "light" : "dark";
    button.textContent = other === "light" ? "☀ Light" : "☾ Dark";
    button.setAttribute("aria-label", `Switch to ${other} colours`);
    document.dispatchEvent(new Event("themechange"));
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    tell();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", tell);
  tell();
}

function startCopy() {
  byId("copy")?.addEventListener("click", async () => {
    const command = byId("command");
    try {
      await navigator.clipboard.writeText(command.textContent);
      byId("copy").textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(command);
      byId("copy").textContent = "Selected: copy it by hand";
    }
  });
}

const askedFor = () => {
  const found = /^#q=(.*)$/s.exec(location.hash);
  try {
    return found && decodeURIComponent(found[1]);
  } catch {
    return null;
  }
};
const address = (question) => `#q=${encodeURIComponent(question.id)}`;

// The dialog follows the address: a link, a click and the Back button all go through `follow`.
function startDetail(run, details) {
  const dialog = byId("detail");
  let current = null;
  let table = null;

  const neighbours = () => {
    const found = table.found();
    return found.includes(current) ? found : run.questions;
  };

  async function show(question) {
    current = question;
    const among = neighbours();
    const place = among.indexOf(question);
    byId("previous").disabled = place === 0;
    byId("next").disabled = place === among.length - 1;
    byId("detail-place").textContent = `${place + 1} of ${among.length.toLocaleString("en")}`;
    const { tokens, questions } = await details();
    if (current !== question) return;
    byId("detail-body").replaceChildren(...renderDetail(run, question, own(questions, question.id), tokens));
    if (!dialog.open) dialog.showModal();
    byId("detail-body").scrollTop = 0;
    byId("detail-body").focus({ preventScroll: true });
  }

  function step(by) {
    const among = neighbours();
    const next = among[among.indexOf(current) + by];
    if (!next) return;
    history.replaceState(null, "", address(next));
    show(next);
  }

  function follow() {
    const question = run.byId.get(askedFor());
    if (question) show(question);
    else if (dialog.open) dialog.close();
  }

  dialog.addEventListener("close", () => {
    const last = current;
    current = null;
    if (askedFor() !== null) history.replaceState(null, "", "#questions");
    if (last) table.focus(last);
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest(".scroll")) return;
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => dialog.close());
  addEventListener("hashchange", follow);
  table = questionTable(run, (question) => {
    if (askedFor() === question.id) show(question);
    else location.hash = address(question);
  });
  follow();
}

function broken(reason) {
  byId("broken").hidden = false;
  byId("broken").textContent = reason;
  byId("count").textContent = "";
}

async function start() {
  startTheme();
  startCopy();
  if (typeof DecompressionStream === "undefined") {
    broken("This browser cannot unpack the questions; one of 2023 or later can.");
    return;
  }
  const run = readRun(await unpackJson("records"));
  let unpacked = null;
  const details = () => (unpacked ??= unpackJson("details"));
  startDetail(run, details);
  performance.mark("table-ready");
  // the table is painted before a megabyte of plotly is read
  await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
  await drawFigures();
  performance.mark("figures-drawn");
  document.documentElement.dataset.ready = "yes";
  details();
}

start();
