// Curves as SVG, redrawn at the width of their card.
const HEIGHT = 170, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 20;

/** Colour of a curve; grey is kept for what a stack does not name. */
function color(chart, index) {
  return chart.series[index].label === "other" ? "var(--s7)" : `var(--s${index % 7})`;
}

/** Round values that cover [low, high] in about `count` steps. */
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const values = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) values.push(k * step || 0);
  return values;
}

/** The text of an axis value: all values of an axis get the same number of digits. */
function axisLabel(unit, value, levels) {
  if (unit === "log") return "1e" + Math.round(Math.log10(value));
  const step = (levels.length > 1 ? levels[1] - levels[0] : Math.abs(value) || 1) * (unit === "percent" ? 100 : 1);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  if (value === 0) return unit === "percent" ? "0%" : "0";
  if (unit === "percent") return percent(value, digits);
  if (digits > 3) return value.toExponential(levels.some((v) => v && Math.abs(v / 10 ** Math.floor(Math.log10(Math.abs(v))) % 1) > 0.01) ? 1 : 0);
  return (digits ? value.toFixed(digits) : Math.round(value).toLocaleString("en")) + (unit === "seconds" ? " s" : "");
}

function logTicks(low, high) {
  const from = Math.ceil(Math.log10(low) - 1e-9), to = Math.floor(Math.log10(high) + 1e-9);
  const every = Math.max(1, Math.ceil((to - from) / 4)), values = [];
  for (let e = from; e <= to; e += every) values.push(10 ** e);
  return values;
}

/** What is drawn: lines as they are, a stack as running sums, each with its own points for the tooltip. */
function layers(chart) {
  if (chart.kind !== "stack") return chart.series.map((series) => ({ ...series, drawn: series.points }));
  const sums = new Map();
  return chart.series.map((series) => {
    const drawn = series.points.map(([x, y]) => {
      const base = sums.get(x) || 0;
      sums.set(x, base + (y || 0));
      return [x, base + (y || 0), base];
    });
    return { ...series, drawn };
  });
}

function range(chart, curves) {
  const log = chart.unit === "log";
  const values = curves.flatMap((curve) => curve.drawn.map((p) => p[1]).filter((y) => y != null && (!log || y > 0)));
  if (!values.length) return log ? [0.1, 1] : [0, 1];
  let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  if (log) return [10 ** Math.floor(Math.log10(low)), 10 ** Math.ceil(Math.log10(high) + 1e-9)];
  // Zero belongs on the axis unless the curve lives far from it.
  if (chart.kind === "stack" || chart.unit === "percent" || (low > 0 && low < 0.5 * high)) low = Math.min(low, 0);
  if (high === low) { high += Math.abs(high) / 10 || 1; low -= low === 0 ? 0 : Math.abs(low) / 10; }
  const pad = 0.04 * (high - low);
  if (chart.unit === "percent" && high <= 1) return [low, Math.min(1, high + pad)];
  return [low === 0 ? 0 : low - pad, high + pad];
}

/** SVG path through points with a value; a missing value breaks the line, a point alone becomes a dot. */
function pathOf(points, x, y) {
  let path = "", open = false;
  points.forEach((point, i) => {
    if (point[1] == null) { open = false; return; }
    const next = points[i + 1];
    path += `${open ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`;
    if (!open && (!next || next[1] == null)) path += "h0.01";
    open = true;
  });
  return path;
}

function areaOf(upper, lower, x, y) {
  const points = [...upper.map((p) => [p[0], p[1]]), ...[...lower].reverse().map((p) => [p[0], p[1]])];
  return "M" + points.map((p) => `${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("L") + "Z";
}

function drawChart(svg, chart, width) {
  const curves = layers(chart), log = chart.unit === "log";
  const steps = [...new Set(curves.flatMap((curve) => curve.drawn.map((p) => p[0])))].sort((a, b) => a - b);
  const [low, high] = range(chart, curves), first = steps[0], last = steps[steps.length - 1];
  const scale = log ? Math.log10 : (value) => value;
  const x = (step) => LEFT + (first === last ? 0.5 : (step - first) / (last - first)) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - Math.min(1, Math.max(0,
    (scale(log ? Math.max(value, low) : value) - scale(low)) / (scale(high) - scale(low)))) * (HEIGHT - TOP - BOTTOM);
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.replaceChildren();

  const levels = log ? logTicks(low, high) : ticks(low, high, 4);
  for (const value of levels) {
    svg.append(el("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
    svg.append(el("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end", text: axisLabel(chart.unit, value, levels) }));
  }
  for (const step of first === last ? [first] : ticks(first, last, width / 90).filter(Number.isInteger)) {
    const anchor = x(step) > width - 24 ? "end" : "middle";
    svg.append(el("text", { x: Math.min(x(step), width - RIGHT), y: HEIGHT - 5, "text-anchor": anchor, text: number(step) }));
  }
  if (!chart.section.startsWith("Supervised")) {
    for (const [step, count] of DATA.skipped.filter(([step]) => step >= first && step <= last)) {
      const mark = el("line", { class: "skip", x1: x(step), x2: x(step), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM - 9 });
      mark.append(document.createElementNS(svg.namespaceURI, "title"));
      mark.firstChild.textContent = `step ${step}: ${count} updates skipped`;
      svg.append(mark);
    }
  }
  if (chart.kind === "band" && curves.length === 3) {
    const complete = (points) => points.filter((p) => p[1] != null);
    svg.append(el("path", { d: areaOf(complete(curves[2].drawn), complete(curves[1].drawn), x, y), fill: color(chart, 0), "fill-opacity": 0.16 }));
  }
  curves.forEach((curve, i) => {
    if (!curve.drawn.length) return;
    if (chart.kind === "stack") {
      const base = curve.drawn.map((p) => [p[0], p[2]]);
      svg.append(el("path", { class: "layer", d: areaOf(curve.drawn, base, x, y), fill: color(chart, i), "fill-opacity": 0.8 }));
    } else {
      const faint = chart.kind === "band" && i > 0;
      svg.append(el("path", { class: "curve", d: pathOf(curve.drawn, x, y), stroke: color(chart, faint ? 0 : i), "stroke-opacity": faint ? 0.35 : 1 }));
      if (curve.drawn.length <= 24 && !faint) {
        for (const point of curve.drawn.filter((p) => p[1] != null)) {
          svg.append(el("circle", { cx: x(point[0]), cy: y(point[1]), r: 2.2, fill: color(chart, i) }));
        }
      }
    }
  });
  const cursor = el("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  return { steps, x, cursor };
}

function tooltip(chart, step) {
  const lines = chart.series.flatMap(({ label, points }) => {
    const point = points.find((p) => p[0] === step);
    return point ? [`${label}: ${point[1] == null ? "not finite" : FORMATS[chart.unit](point[1])}`] : [];
  });
  const skipped = DATA.skipped.find((entry) => entry[0] === step);
  return [`step ${step}`, ...lines, ...(skipped ? [`updates skipped: ${skipped[1]}`] : [])].join("\n");
}

function chartCard(chart) {
  const svg = el("svg", { class: "chart", role: "img", tabindex: 0 });
  const lastOf = (points) => points.length ? points[points.length - 1][1] : null;
  const legend = chart.series.map(({ label, points }, i) => el("li", {},
    el("i", { style: `background:${color(chart, chart.kind === "band" ? 0 : i)};opacity:${chart.kind === "band" && i ? 0.35 : 1}` }),
    label, el("b", { text: FORMATS[chart.unit](lastOf(points)) })));
  svg.setAttribute("aria-label", `${chart.title}. Last values: ` + chart.series.map(
    ({ label, points }) => `${label} ${FORMATS[chart.unit](lastOf(points))}`).join(", ") + ". Arrow keys read the steps.");
  let view = null, at = null;
  const point = (index) => {
    at = Math.min(Math.max(index, 0), view.steps.length - 1);
    const step = view.steps[at], box = svg.getBoundingClientRect(), left = box.left + view.x(step);
    view.cursor.setAttribute("x1", view.x(step));
    view.cursor.setAttribute("x2", view.x(step));
    view.cursor.setAttribute("visibility", "visible");
    showTip(tooltip(chart, step), { left: left + 10, top: box.top + 30, bottom: box.top + 10 });
  };
  const leave = () => { at = null; hideTip(); view.cursor.setAttribute("visibility", "hidden"); };
  svg.addEventListener("pointermove", (event) => {
    const offset = event.clientX - svg.getBoundingClientRect().left;
    const distances = view.steps.map((step) => Math.abs(view.x(step) - offset));
    point(distances.indexOf(distances.reduce((a, b) => Math.min(a, b))));
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    point(at == null ? (move > 0 ? 0 : view.steps.length - 1) : at + move);
  });
  new ResizeObserver(() => { view = drawChart(svg, chart, svg.clientWidth || 350); }).observe(svg);
  view = drawChart(svg, chart, 350);
  return el("figure", { class: "card" }, el("figcaption", {}, chart.title, el("ul", { class: "legend" }, ...legend)), svg);
}

function showCurves(root) {
  root.append(el("h2", { text: "Curves" }));
  if (!DATA.charts.length) {
    root.append(el("p", { class: "empty", text: "No metrics yet. They appear here once the first step is done." }));
    return;
  }
  if (DATA.skipped.length) {
    const total = DATA.skipped.reduce((sum, entry) => sum + entry[1], 0);
    const shown = DATA.skipped.slice(0, 30).map((entry) => entry[0]).join(", ");
    root.append(el("p", { class: "bad skipped", text:
      `${number(total)} update${total === 1 ? "" : "s"} skipped (no usable group, or not finite) at steps ${shown}` +
      (DATA.skipped.length > 30 ? ` and ${DATA.skipped.length - 30} more` : "") + "; marked on the step axes." }));
  }
  if (DATA.charts.some((chart) => chart.thinned)) {
    root.append(el("p", { class: "note", text: "Long curves show their extremes; metrics.jsonl has every step." }));
  }
  for (const section of new Set(DATA.charts.map((chart) => chart.section))) {
    root.append(el("h3", { text: section }));
    root.append(el("div", { class: "charts" }, ...DATA.charts.filter((c) => c.section === section).map(chartCard)));
  }
}
