// The trace viewer: the canvases of one or several samples at one denoise step.
//
//   prompt tail | block | block | ...      edges lie on the absolute grid: positions that are multiples of B; of
//                                          full-attention models they are counted from the end of the prompt
//
// Every token keeps its width while it is masked, so that nothing moves when it is revealed.
const MOST_PANES = 6;
const viewer = { root: null, panes: [], step: 0, last: 0, timer: null };

const COLORINGS = {
  block: "step within its block",
  overall: "step overall",
  confidence: "confidence",
};

function ramp(fraction) {
  return fraction < 0.5
    ? `color-mix(in oklab, var(--early), var(--middle) ${Math.round(200 * fraction)}%)`
    : `color-mix(in oklab, var(--middle), var(--late) ${Math.round(200 * fraction - 100)}%)`;
}

/** Tokens of the canvas from the first generated block on: {text, id, step, logprob, position, kind}. */
function canvasOf(sample) {
  const p = sample.prompt_length, tail = sample.prompt_tail || [], tokens = [];
  tail.forEach((text, i) => tokens.push({ text, step: 0, position: p - tail.length + i, kind: "given" }));
  const add = (ids, steps, texts, logprobs, start, kind) => (ids || []).forEach((id, i) => tokens.push({
    id, kind, text: texts && texts[i] != null ? texts[i] : id + " ", step: steps[i], position: start + i,
    logprob: logprobs ? logprobs[i] : null,
  }));
  add(sample.ids, sample.step_map, sample.tokens, sample.logprobs, p, "");
  add(sample.tail_ids, sample.tail_step_map, sample.tail_tokens, null, p + sample.ids.length, "beyond");
  // Rank of a token's step among the steps of its block: 1 for what was revealed first.
  const blocks = new Map(), first = sample.canvas_len ? p : 0;
  for (const token of tokens) {
    token.block = sample.block_size ? Math.floor((token.position - first) / sample.block_size) : 0;
    if (token.step) blocks.set(token.block, (blocks.get(token.block) || new Set()).add(token.step));
  }
  for (const token of tokens) {
    token.rank = token.step ? [...blocks.get(token.block)].filter((step) => step <= token.step).length : 0;
  }
  return tokens;
}

function describeToken(token, sample) {
  const shown = JSON.stringify(token.text);
  const place = `position ${token.position}` + (sample.block_size ? `, block ${token.block}` : "");
  if (token.kind === "given") return `${shown}\n${place}\nprompt token in the first block`;
  const lines = [shown, `id ${token.id}, ${place}`, `revealed at step ${token.step}`];
  if (token.logprob != null) lines.push(`probability ${percent(Math.exp(token.logprob))} (log-prob ${token.logprob.toFixed(4)})`);
  if (token.kind === "beyond") lines.push("beyond the end: not part of the completion");
  return token.step > viewer.step ? `masked\n${place}` : lines.join("\n");
}

const allTokens = () => viewer.panes.flatMap((pane) => pane.tokens);

function paint() {
  const coloring = viewer.root.querySelector("[name=coloring]").value;
  const tokens = allTokens(), ranks = Math.max(...tokens.map((token) => token.rank), 1);
  for (const token of tokens.filter((token) => token.kind !== "given")) {
    const share = coloring === "block" ? (token.rank - 1) / Math.max(ranks - 1, 1)
      : (token.step - 1) / Math.max(viewer.last - 1, 1);
    token.color = coloring !== "confidence" ? ramp(share) : token.logprob == null ? "var(--fill)"
      : `color-mix(in oklab, var(--high) ${Math.round(100 * Math.exp(token.logprob))}%, var(--low))`;
  }
  const key = viewer.root.querySelector(".key");
  const swatch = (background, text) => el("span", {}, el("span", { class: "tok swatch", style: `background:${background}` }), text);
  const ordinal = (n) => n + (["th", "st", "nd", "rd"][n % 100 > 10 && n % 100 < 14 ? 0 : n % 10] || "th");
  const entries = coloring === "confidence" ? [swatch("var(--low)", "improbable"), swatch("var(--high)", "certain")]
    : coloring === "overall" ? [swatch(ramp(0), "first step"), swatch(ramp(1), `step ${viewer.last}`)]
    : Array.from({ length: Math.min(ranks, 8) }, (_, i) => {
      const rank = ranks <= 8 ? i + 1 : 1 + Math.round(i * (ranks - 1) / 7);
      return swatch(ramp((rank - 1) / Math.max(ranks - 1, 1)), `${ordinal(rank)} step of its block`);
    });
  entries.push(el("span", {}, el("span", { class: "tok masked swatch" }), "masked"));
  if (tokens.some((token) => token.kind === "given")) {
    entries.push(el("span", {}, el("span", { class: "tok given swatch" }), "prompt"));
  }
  if (tokens.some((token) => token.kind === "beyond")) entries.push(el("span", { text: "faded: beyond the end" }));
  if (viewer.root.querySelector(".edge")) entries.push(el("span", {}, el("span", { class: "edge" }), "block boundary"));
  key.replaceChildren(...entries);
}

function showStep(step) {
  viewer.step = Math.min(Math.max(step, 0), viewer.last);
  const counts = viewer.panes.map(showPane);
  const total = (name) => counts.reduce((sum, count) => sum + count[name], 0);
  const find = (selector) => viewer.root.querySelector(selector);
  find("[type=range]").value = viewer.step;
  find("[type=range]").setAttribute("aria-valuetext", `step ${viewer.step} of ${viewer.last}`);
  find(".first").disabled = find(".previous").disabled = viewer.step === 0;
  find(".last").disabled = find(".next").disabled = viewer.step === viewer.last;
  const alone = viewer.panes.length === 1 && counts[0].block != null ? `block ${counts[0].block}, ` : "";
  find(".where").textContent = `Step ${viewer.step} of ${viewer.last}: ${alone}` +
    (total("now") ? `${total("now")} revealed now, ` : "") + `${total("visible")} of ${total("all")} tokens visible`;
  viewer.root.dataset.step = viewer.step;
  viewer.root.dataset.masked = total("all") - total("visible");
  history.replaceState(null, "", `#sample=${viewer.panes.map((pane) => pane.index)}&step=${viewer.step}`);
}

/** One canvas at the viewer's step: {all, visible, now, block}, numbers of tokens and the block they are in now. */
function showPane(pane) {
  const now = [], tokens = pane.tokens.filter((token) => token.kind !== "given");
  for (const token of tokens) {
    const masked = token.step > viewer.step;
    if (token.step === viewer.step) now.push(token);
    token.node.classList.toggle("masked", masked);
    token.node.classList.toggle("now", token.step === viewer.step);
    token.node.style.background = masked ? "" : token.color;
  }
  const visible = tokens.filter((token) => token.step <= viewer.step).length;
  pane.node.querySelector(".progress").textContent = viewer.step < pane.last ? `${visible} of ${tokens.length} visible` : "done";
  if (now.length && viewer.timer) {
    const { canvas } = pane, top = now[0].node.offsetTop - canvas.offsetTop;
    if (top < canvas.scrollTop || top > canvas.scrollTop + canvas.clientHeight - 40) canvas.scrollTop = top - 60;
  }
  return { all: tokens.length, visible, now: now.length, block: pane.sample.block_size ? now[0]?.block : null };
}

function play(start) {
  clearInterval(viewer.timer);
  viewer.timer = null;
  if (start) {
    if (viewer.step === viewer.last) showStep(0);
    viewer.timer = setInterval(() => {
      showStep(viewer.step + 1);
      if (viewer.step === viewer.last) play(false);
    }, Math.min(400, Math.max(40, 20000 / viewer.last)));
  }
  const button = viewer.root.querySelector(".play");
  button.textContent = start ? "Pause" : "Play";
  // A screen reader is told the step one arrives at, not every step played.
  viewer.root.querySelector(".where").setAttribute("aria-live", start ? "off" : "polite");
}

function facts(sample) {
  const item = (name, value) => el("span", {}, el("span", { text: name + " " }), value);
  const judged = sample.reward !== undefined || sample.accuracy != null, verdict = verdictOf(sample);
  const parts = Object.entries(sample.rewards || {}).map(([name, value]) => `${name} ${number(value)}`).join(", ");
  return el("div", { class: "verdict" },
    judged ? item("", el("b", { class: VERDICT_CLASS[verdict] || "", text: verdict })) : null,
    judged ? item("reward", number(sample.reward) + (parts ? ` (${parts})` : "")) : null,
    sample.ground_truth == null ? null : item("expected", typeof sample.ground_truth === "string"
      ? sample.ground_truth : JSON.stringify(sample.ground_truth)),
    sample.stop_reason ? item("ended by", sample.stop_reason === "stop" ? "stop token" : "length limit") : null,
    item("tokens", String(sample.ids.length)),
    item("denoise steps", String(Math.max(0, ...sample.step_map))),
    item("tokens per step", tokensPerStep(sample)),
    sample.forwards ? item("forwards", number(sample.forwards)) : null);
}

/** A sample with its canvas; the prompt too, where it has one of its own. */
function makePane(index, shared) {
  const sample = DATA.samples[index], tokens = canvasOf(sample), pane = { index, sample, tokens, pointed: null };
  pane.last = Math.max(0, ...tokens.map((token) => token.step));
  pane.canvas = el("div", {
    class: "canvas", tabindex: 0, role: "group", "aria-label": `Tokens of ${nameOf(index)}. Arrow keys move from token to token.`,
    onpointerover: (event) => {
      const node = event.target.closest("[data-i]");
      if (node) showTip(describeToken(tokens[node.dataset.i], sample), node.getBoundingClientRect());
    },
    onpointerout: hideTip,
    onblur: () => pointAt(pane, null),
    onkeydown: (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 }[event.key];
      if (!move) return;
      event.preventDefault();
      pointAt(pane, pane.pointed == null ? 0 : Math.min(Math.max(pane.pointed + move, 0), tokens.length - 1));
    },
  });
  tokens.forEach((token, i) => {
    if (i && token.block !== tokens[i - 1].block) {
      pane.canvas.append(el("span", { class: "edge", title: `block ${token.block} starts at position ${token.position}` }));
    }
    token.node = el("span", { class: `tok ${token.kind}`, "data-i": i, text: token.text.replace(/\n/g, "↵") || "·" });
    pane.canvas.append(token.node);
    if (token.text.includes("\n")) pane.canvas.append(el("br"));
  });
  pane.node = el("article", {},
    el("h3", {}, nameOf(index), el("span", { class: "progress" })),
    facts(sample), shared ? null : promptOf(sample), pane.canvas);
  return pane;
}

const promptOf = (sample) =>
  el("div", { class: "prompt", tabindex: 0, role: "group", "aria-label": "Prompt", text: sample.prompt ?? "" });

/** Open samples side by side at a step; without one, at the last. */
function openSamples(indices, step) {
  if (String(indices) !== String(viewer.panes.map((pane) => pane.index))) {
    if (viewer.timer) play(false);
    const samples = indices.map((i) => DATA.samples[i]);
    const shared = samples.every((sample) => sample.prompt === samples[0].prompt);
    viewer.panes = indices.map((i) => makePane(i, shared));
    viewer.last = Math.max(...viewer.panes.map((pane) => pane.last));
    const of = samples[0].phase && samples.length === 1 ? ` (${samples[0].phase} step ${samples[0].step})` : "";
    viewer.root.querySelector("h2").textContent =
      `Trace${indices.length > 1 ? "s" : ""} of ${indices.map(nameOf).join(" · ")}${of}`;
    viewer.root.querySelector(".shared").replaceChildren(...(shared ? [promptOf(samples[0])] : []));
    viewer.root.querySelector(".panes").replaceChildren(...viewer.panes.map((pane) => pane.node));
    viewer.root.querySelector(".panes").classList.toggle("several", indices.length > 1);
    viewer.root.querySelector("[type=range]").max = viewer.last;
    markOpen();
    paint();
  }
  showStep(step == null ? viewer.last : step);
}

/** Put a sample beside those that are open, or take it away; one stays. */
function showBeside(index, beside) {
  const others = viewer.panes.map((pane) => pane.index).filter((i) => i !== index);
  const wanted = beside ? [...others, index].slice(-MOST_PANES) : others.length ? others : [index];
  openSamples(wanted, viewer.step === viewer.last ? null : viewer.step);
  markOpen();
}

/** Go where "#sample=3,5&step=7" says; false when the hash names no sample of this page. */
function openHash() {
  const hash = new URLSearchParams(location.hash.slice(1)), step = Number(hash.get("step") ?? NaN);
  const indices = (hash.get("sample") ?? "").split(",").filter((text) => DATA.samples[text]).map(Number);
  if (!indices.length) return false;
  openSamples([...new Set(indices)].slice(0, MOST_PANES), Number.isInteger(step) ? step : null);
  return true;
}

function pointAt(pane, i) {
  pane.tokens[pane.pointed]?.node.classList.remove("pointed");
  pane.pointed = i;
  if (i == null) { hideTip(); return; }
  const token = pane.tokens[i];
  token.node.classList.add("pointed");
  token.node.scrollIntoView({ block: "nearest" });
  showTip(describeToken(token, pane.sample), token.node.getBoundingClientRect());
}

/** Keys of the whole page, where nothing that has the focus wants them. */
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (event.target.closest?.("input, select, textarea, .canvas, svg")) return;
  const step = { ArrowLeft: viewer.step - 1, ArrowRight: viewer.step + 1 }[event.key];
  if (step != null) { play(false); showStep(step); }
  else if (event.key === "k") play(!viewer.timer);
}

/** Make the viewer and open what the hash says, or else these samples. */
function showViewer(root, indices) {
  viewer.root = root;
  const go = (step) => { play(false); showStep(step()); };
  // Drawn, because fonts lack the media symbols.
  const button = (name, shape, label, step) =>
    el("button", { type: "button", class: name, "aria-label": label, title: label, onclick: () => go(step) },
      el("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, el("path", { d: shape })));
  root.append(el("h2"), el("div", { class: "card viewer" },
    el("div", { class: "shared" }),
    el("div", { class: "player" },
      button("first", "M2 2h2v12H2zM14 2v12L5 8z", "First step", () => 0),
      button("previous", "M12 2v12L3 8z", "Previous step", () => viewer.step - 1),
      el("button", { type: "button", class: "play", text: "Play", onclick: () => play(!viewer.timer) }),
      button("next", "M4 2v12l9-6z", "Next step", () => viewer.step + 1),
      button("last", "M12 2h2v12h-2zM2 2v12l9-6z", "Last step", () => viewer.last),
      el("input", { type: "range", min: 0, max: 0, step: 1, "aria-label": "Denoise step",
        oninput: (event) => go(() => Number(event.target.value)) }),
      el("div", { class: "where", "aria-live": "polite" })),
    el("div", { class: "panes" }),
    el("div", { class: "key" }),
    el("div", { class: "key" }, el("label", {}, "Colour by ", el("select", { name: "coloring", onchange: () => { paint(); showStep(viewer.step); } },
      ...Object.entries(COLORINGS).map(([value, text]) => el("option", { value, text })))),
      el("span", {}, "Keys: ", el("kbd", { text: "←" }), " ", el("kbd", { text: "→" }), " step, ", el("kbd", { text: "k" }), " play"))));
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", openHash);
  if (!openHash()) openSamples(indices);
}
