// Figures, drawn by plotly after the table is up, and redrawn in the colours of the theme.

async function loadPlotly() {
  const script = document.createElement("script");
  script.textContent = await unpack("plotly");
  document.head.append(script);
}

const isDark = () => getComputedStyle(document.documentElement).getPropertyValue("--is-dark").trim() === "1";

function themed(layout) {
  const [ink, line] = isDark() ? ["#e7eaee", "#3a424c"] : ["#1d2127", "#dfe3e8"];
  const colours = { gridcolor: line, zerolinecolor: line, linecolor: line };
  const axes = Object.keys(layout).filter((name) => /^[xy]axis\d*$/.test(name));
  const made = {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { ...layout.font, color: ink, family: "system-ui, sans-serif" },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : layout.dragmode,
  };
  for (const name of axes) made[name] = { ...colours, ...layout[name] };
  return made;
}

const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };

function drawFigure(place, spec) {
  return Plotly.react(place, spec.data, themed(spec.layout), CONFIG);
}

async function drawFigures() {
  const places = [...document.querySelectorAll("[data-figure]")];
  if (!places.length) return;
  const [figures] = await Promise.all([unpackJson("figures"), loadPlotly()]);
  performance.mark("plotly-loaded");
  const drawAll = async () => {
    for (const place of places) {
      const { name, spec } = figures[Number(place.dataset.figure)];
      await drawFigure(place, spec);
      performance.mark(`drawn-${name}`);
    }
  };
  await drawAll();
  document.addEventListener("themechange", drawAll);
}
