// The trace viewer: the canvas of one sample at one denoise step.
//
//   prompt tail | block | block | ...      edges lie on the absolute grid: positions that are multiples of B
//
// Every token keeps its width while it is masked, so that nothing moves when it is revealed.
const viewer = { root: document.getElementById("viewer"), sample: -1, step: 0, last: 0, tokens: [], timer: null };

const COLORINGS = {
  block: "step within its block",
  overall: "step overall",
  logprob: "log-prob",
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
  const blocks = new Map();
  for (const token of tokens) {
    token.block = sample.block_size ? Math.floor(token.position / sample.block_size) : 0;
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
  if (token.logprob != null) lines.push(`log-prob ${token.logprob.toFixed(4)} (${percent(Math.exp(token.logprob))})`);
  if (token.kind === "beyond") lines.push("beyond the end: not part of the completion");
  return token.step > viewer.step ? `masked\n${place}` : lines.join("\n");
}

function paint() {
  const coloring = viewer.root.querySelector("[name=coloring]").value;
  const ranks = Math.max(...viewer.tokens.map((token) => token.rank), 1);
  for (const token of viewer.tokens.filter((token) => token.kind !== "given")) {
    const share = coloring === "block" ? (token.rank - 1) / Math.max(ranks - 1, 1)
      : (token.step - 1) / Math.max(viewer.last - 1, 1);
    const probability = token.logprob == null ? 1 : Math.exp(token.logprob);
    token.color = coloring === "logprob"
      ? `color-mix(in oklab, var(--high) ${Math.round(100 * probability)}%, var(--low))` : ramp(share);
  }
  const key = viewer.root.querySelector(".key");
  const swatch = (background, text) => el("span", {}, el("span", { class: "tok swatch", style: `background:${background}` }), text);
  const ordinal = (n) => n + (["th", "st", "nd", "rd"][n % 100 > 10 && n % 100 < 14 ? 0 : n % 10] || "th");
  const entries = coloring === "logprob" ? [swatch("var(--low)", "improbable"), swatch("var(--high)", "certain")]
    : coloring === "overall" ? [swatch(ramp(0), "first step"), swatch(ramp(1), `step ${viewer.last}`)]
    : Array.from({ length: Math.min(ranks, 8) }, (_, i) => {
      const rank = ranks <= 8 ? i + 1 : 1 + Math.round(i * (ranks - 1) / 7);
      return swatch(ramp((rank - 1) / Math.max(ranks - 1, 1)), `${ordinal(rank)} step of its block`);
    });
  entries.push(el("span", {}, el("span", { class: "tok masked swatch" }), "masked"));
  if (viewer.tokens.some((token) => token.kind === "given")) {
    entries.push(el("span", {}, el("span", { class: "tok given swatch" }), "prompt"));
  }
  if (viewer.tokens.some((token) => token.kind === "beyond")) entries.push(el("span", { text: "faded: beyond the end" }));
  if (viewer.root.querySelector(".edge")) entries.push(el("span", {}, el("span", { class: "edge" }), "block boundary"));
  key.replaceChildren(...entries);
}

function showStep(step) {
  viewer.step = Math.min(Math.max(step, 0), viewer.last);
  const now = [];
  let revealed = 0, total = 0;
  for (const token of viewer.tokens) {
    if (token.kind === "given") continue;
    const masked = token.step > viewer.step;
    total += 1;
    revealed += !masked;
    if (token.step === viewer.step) now.push(token);
    token.node.classList.toggle("masked", masked);
    token.node.classList.toggle("now", token.step === viewer.step);
    token.node.style.background = masked ? "" : token.color;
  }
  const find = (selector) => viewer.root.querySelector(selector);
  find("[type=range]").value = viewer.step;
  find("[type=range]").setAttribute("aria-valuetext", `step ${viewer.step} of ${viewer.last}`);
  find(".first").disabled = find(".previous").disabled = viewer.step === 0;
  find(".last").disabled = find(".next").disabled = viewer.step === viewer.last;
  const block = now.length && DATA.samples[viewer.sample].block_size ? `block ${now[0].block}, ` : "";
  find(".where").textContent = `Step ${viewer.step} of ${viewer.last}: ${block}` +
    (now.length ? `${now.length} revealed now, ` : "") + `${revealed} of ${total} tokens visible`;
  viewer.root.dataset.step = viewer.step;
  viewer.root.dataset.masked = total - revealed;
  history.replaceState(null, "", `#sample=${viewer.sample}&step=${viewer.step}`);
  if (now.length && viewer.timer) {
    const canvas = find(".canvas"), top = now[0].node.offsetTop - canvas.offsetTop;
    if (top < canvas.scrollTop || top > canvas.scrollTop + canvas.clientHeight - 40) canvas.scrollTop = top - 60;
  }
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

function verdictOf(sample) {
  if (sample.accuracy == null) return sample.reward == null ? "no verdict" : "not judged";
  return sample.accuracy >= 1 ? "correct" : sample.accuracy > 0 ? "partly correct" : "incorrect";
}

function facts(sample) {
  const last = Math.max(0, ...sample.step_map), verdict = verdictOf(sample);
  const item = (name, value) => el("span", {}, el("span", { text: name + " " }), value);
  const parts = Object.entries(sample.rewards || {}).map(([name, value]) => `${name} ${number(value)}`).join(", ");
  return el("div", { class: "verdict" },
    item("", el("b", { class: { correct: "good", incorrect: "bad" }[verdict] || "", text: verdict })),
    item("reward", number(sample.reward) + (parts ? ` (${parts})` : "")),
    sample.ground_truth == null ? null : item("expected", typeof sample.ground_truth === "string"
      ? sample.ground_truth : JSON.stringify(sample.ground_truth)),
    item("ended by", sample.stop_reason === "stop" ? "stop token" : "length limit"),
    item("tokens", String(sample.ids.length)),
    item("denoise steps", String(last)),
    item("tokens per step", ratio(last ? sample.ids.length / last : null)));
}

/** Open a sample at a step; without one, at its last. */
function openSample(index, step) {
  if (viewer.sample !== index) {
    if (viewer.timer) play(false);
    const sample = DATA.samples[index];
    viewer.sample = index;
    viewer.tokens = canvasOf(sample);
    viewer.last = Math.max(0, ...viewer.tokens.map((token) => token.step));
    const canvas = viewer.root.querySelector(".canvas");
    canvas.replaceChildren();
    viewer.tokens.forEach((token, i) => {
      if (i && sample.block_size && token.position % sample.block_size === 0) {
        canvas.append(el("span", { class: "edge", title: `block ${token.block} starts at position ${token.position}` }));
      }
      token.node = el("span", { class: `tok ${token.kind}`, "data-i": i, text: token.text.replace(/\n/g, "↵") || "·" });
      canvas.append(token.node);
      if (token.text.includes("\n")) canvas.append(el("br"));
    });
    viewer.root.querySelector("h2").textContent = `Trace of sample ${index} (${sample.phase} step ${sample.step})`;
    viewer.root.querySelector(".prompt").textContent = sample.prompt ?? "";
    viewer.root.querySelector(".verdict").replaceWith(facts(sample));
    viewer.root.querySelector("[type=range]").max = viewer.last;
    document.querySelectorAll(".rows tr.chosen").forEach((row) => row.classList.remove("chosen"));
    document.querySelector(`.rows tr[data-sample="${index}"]`)?.classList.add("chosen");
    viewer.pointed = null;
    paint();
  }
  showStep(step == null ? viewer.last : step);
}

/** Go where "#sample=3&step=7" says; false when the hash names no sample of this page. */
function openHash() {
  const hash = new URLSearchParams(location.hash.slice(1));
  const index = Number(hash.get("sample") ?? NaN), step = Number(hash.get("step") ?? NaN);
  if (!DATA.samples[index]) return false;
  openSample(index, Number.isInteger(step) ? step : null);
  return true;
}

function pointAt(i) {
  viewer.tokens[viewer.pointed]?.node.classList.remove("pointed");
  viewer.pointed = i;
  if (i == null) { hideTip(); return; }
  const token = viewer.tokens[i];
  token.node.classList.add("pointed");
  token.node.scrollIntoView({ block: "nearest" });
  showTip(describeToken(token, DATA.samples[viewer.sample]), token.node.getBoundingClientRect());
}

function showViewer() {
  const go = (step) => { play(false); showStep(step()); };
  // Drawn, because fonts lack the media symbols.
  const button = (name, shape, label, step) =>
    el("button", { type: "button", class: name, "aria-label": label, title: label, onclick: () => go(step) },
      el("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, el("path", { d: shape })));
  const canvas = el("div", {
    class: "canvas", tabindex: 0, role: "group", "aria-label": "Response tokens. Arrow keys move from token to token.",
    onpointerover: (event) => {
      const node = event.target.closest("[data-i]");
      if (node) showTip(describeToken(viewer.tokens[node.dataset.i], DATA.samples[viewer.sample]), node.getBoundingClientRect());
    },
    onpointerout: hideTip,
    onblur: () => pointAt(null),
    onkeydown: (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 }[event.key];
      if (!move) return;
      event.preventDefault();
      pointAt(viewer.pointed == null ? 0 : Math.min(Math.max(viewer.pointed + move, 0), viewer.tokens.length - 1));
    },
  });
  viewer.root.append(el("h2"), el("div", { class: "card viewer" },
    el("div", { class: "verdict" }),
    el("p", { class: "label", text: "Prompt" }), el("div", { class: "prompt", tabindex: 0, role: "group", "aria-label": "Prompt" }),
    el("p", { class: "label", text: "Response" }),
    el("div", { class: "player" },
      button("first", "M2 2h2v12H2zM14 2v12L5 8z", "First step", () => 0),
      button("previous", "M12 2v12L3 8z", "Previous step", () => viewer.step - 1),
      el("button", { type: "button", class: "play", text: "Play", onclick: () => play(!viewer.timer) }),
      button("next", "M4 2v12l9-6z", "Next step", () => viewer.step + 1),
      button("last", "M12 2h2v12h-2zM2 2v12l9-6z", "Last step", () => viewer.last),
      el("input", { type: "range", min: 0, max: 0, step: 1, "aria-label": "Denoise step",
        oninput: (event) => go(() => Number(event.target.value)) }),
      el("div", { class: "where", "aria-live": "polite" })),
    canvas,
    el("div", { class: "key" }),
    el("div", { class: "key" }, el("label", {}, "Colour by ", el("select", { name: "coloring", onchange: () => { paint(); showStep(viewer.step); } },
      ...Object.entries(COLORINGS).map(([value, text]) => el("option", { value, text })))))));
  window.addEventListener("hashchange", openHash);
  if (!openHash()) openSample(DATA.samples.length - 1);
}
