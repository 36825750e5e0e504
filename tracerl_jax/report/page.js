// Header, results, sample table, configuration; then everything is put together.
function showHeader(root) {
  document.title = `${DATA.name} – run report`;
  const themes = { "": "Theme: system", light: "Theme: light", dark: "Theme: dark" };
  const theme = el("button", { type: "button", class: "theme", text: themes[""], onclick: () => {
    const names = Object.keys(themes), page = document.documentElement;
    page.dataset.theme = names[(names.indexOf(page.dataset.theme || "") + 1) % names.length];
    theme.textContent = themes[page.dataset.theme];
  } });
  root.append(el("div", { class: "title" },
    el("h1", { text: DATA.name }), el("span", { class: `status ${DATA.status}`, text: DATA.status }), theme));
  const list = el("ul", { class: "facts" });
  const fact = (name, value) => value != null && list.append(el("li", {}, el("span", { text: name + " " }), typeof value === "number" ? number(value) : value));
  const config = (key) => (DATA.config[key] === "" ? null : DATA.config[key]);
  for (const [phase, step] of Object.entries(DATA.progress)) {
    const total = config(`${phase}.steps`);
    fact(`${phase === "sft" ? "warm-up" : "RL"} step`, number(step) + (total ? ` of ${number(total)}` : ""));
  }
  if (DATA.seconds) fact("time in RL steps", seconds(DATA.seconds));
  fact("model", config("model.path") ?? config("model.preset"));
  fact("task", config("task.name"));
  fact("method", config("rl.method"));
  fact("decoding", config("rollout.strategy"));
  fact("block size", config("rollout.block_size"));
  fact("learning rate", config("rl.optimizer.learning_rate"));
  fact("seed", config("seed"));
  fact("page made", DATA.made);
  const link = (id, text) => el("a", { href: `#${id}`, text });
  root.append(list, el("nav", { "aria-label": "Parts of the page" }, link("results", "Results"), link("curves", "Curves"),
    link("samples", "Samples"), link("viewer", "Trace"), link("config", "Configuration")));
}

function showResults(root) {
  root.append(el("h2", { text: "Held-out evaluation" }));
  const stages = Object.keys(DATA.eval);
  const strategies = [...new Set(stages.flatMap((stage) => Object.keys(DATA.eval[stage] || {})))];
  if (!strategies.length) {
    root.append(el("p", { class: "empty", text: "Not evaluated yet." }));
    return;
  }
  const first = stages[0], last = stages[stages.length - 1];
  const change = (from, to, text, better) => {
    if (from == null || to == null || stages.length < 2) return el("td", { text: MISSING });
    return el("td", { class: to > from ? better[0] : to < from ? better[1] : "", text: text(from, to) });
  };
  const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
  const tables = strategies.map((strategy) => {
    const get = (stage, key) => DATA.eval[stage]?.[strategy]?.[key];
    const row = (name, cls, key, form, ...extra) => el("tr", { class: cls }, el("td", { text: name }),
      ...stages.map((stage) => el("td", { text: form(get(stage, key)) })), ...extra);
    return el("div", { class: "card" }, el("table", {},
      el("caption", { text: `${strategy[0].toUpperCase()}${strategy.slice(1).replace(/_/g, " ")} decoding` }),
      el("thead", {}, el("tr", {}, el("th"), ...stages.map((stage) => el("th", { scope: "col", text: stage })), el("th", { scope: "col", text: "change" }))),
      el("tbody", {},
        row("Accuracy", "main", "accuracy", percent, change(get(first, "accuracy"), get(last, "accuracy"),
          (from, to) => `${signed(100 * (to - from), 1)} points`, ["good", "bad"])),
        row("Tokens per step", "", "tokens_per_step", ratio, change(get(first, "tokens_per_step"), get(last, "tokens_per_step"),
          (from, to) => `${signed(100 * (to / from - 1), 0)}%`, ["good", "bad"])),
        row("Problems", "", "n", number, el("td")))));
  });
  root.append(el("div", { class: "results" }, ...tables));
}

function showSamples(root) {
  root.append(el("h2", { text: "Samples" }));
  if (!DATA.samples.length) {
    root.append(el("p", { class: "empty", text: "No samples yet." }));
    return false;
  }
  if (DATA.samples.length < DATA.samples_total) {
    root.append(el("p", { class: "note", text:
      `${number(DATA.samples.length)} of ${number(DATA.samples_total)} samples, spread over the run; samples.jsonl has all.` }));
  }
  const when = (sample) => `${sample.phase} ${sample.step}`;
  const step = el("select", { name: "step", onchange: filter }, el("option", { value: "", text: "all" }),
    ...[...new Set(DATA.samples.map(when))].map((text) => el("option", { value: text, text })));
  const verdict = el("select", { name: "verdict", onchange: filter }, el("option", { value: "", text: "all" }),
    ...[...new Set(DATA.samples.map(verdictOf))].sort().map((text) => el("option", { value: text, text })));
  const search = el("input", { type: "search", name: "search", oninput: filter });
  const count = el("span", { class: "note count", "aria-live": "polite" });
  const rows = DATA.samples.map((sample, i) => {
    const last = Math.max(0, ...sample.step_map), is = verdictOf(sample);
    return el("tr", { "data-sample": i, onclick: () => {
      openSample(i);
      if (viewer.root.getBoundingClientRect().top > window.innerHeight - 200) viewer.root.scrollIntoView();
    } },
      el("td", {}, el("a", { href: `#sample=${i}`, text: i, "aria-label": `open the trace of sample ${i}` })),
      el("td", { text: when(sample) }),
      el("td", { class: { correct: "good", incorrect: "bad" }[is] || "", text: is }),
      el("td", { class: "wide", text: number(sample.reward) }),
      el("td", { text: sample.ids.length }),
      el("td", { class: "wide", text: ratio(last ? sample.ids.length / last : null) }),
      el("td", { class: "text", text: (sample.prompt || "").slice(-160).trim() }),
      el("td", { class: "text wide", text: (sample.text || "").slice(0, 160).trim() }));
  });
  function filter() {
    const wanted = search.value.toLowerCase();
    let shown = 0;
    DATA.samples.forEach((sample, i) => {
      const fits = (!step.value || when(sample) === step.value) && (!verdict.value || verdictOf(sample) === verdict.value)
        && `${sample.prompt}\n${sample.text}`.toLowerCase().includes(wanted);
      rows[i].hidden = !fits;
      shown += fits;
    });
    count.textContent = `${shown} of ${rows.length} shown`;
  }
  filter();
  const heads = [["sample"], ["step"], ["verdict"], ["reward", "wide"], ["tokens"], ["per step", "wide"], ["prompt", "text"], ["completion", "text wide"]];
  root.append(
    el("div", { class: "filters" }, el("label", {}, "Step", step), el("label", {}, "Verdict", verdict),
      el("label", {}, "Search", search), count),
    el("div", { class: "card rows" }, el("table", {},
      el("thead", {}, el("tr", {}, ...heads.map(([text, cls]) => el("th", { scope: "col", class: cls, text })))),
      el("tbody", {}, ...rows))));
  return true;
}

function showConfig(root) {
  const entries = Object.entries(DATA.config);
  if (!entries.length) return;
  root.append(el("details", {}, el("summary", { text: `Configuration (${entries.length} keys)` }),
    el("dl", { class: "config" }, ...entries.map(([key, value]) => el("div", {},
      el("dt", { text: key }), el("dd", { text: typeof value === "string" ? value : JSON.stringify(value) }))))));
}

showHeader(document.getElementById("top"));
showResults(document.getElementById("results"));
showCurves(document.getElementById("curves"));
if (showSamples(document.getElementById("samples"))) showViewer();
showConfig(document.getElementById("config"));
document.documentElement.dataset.ready = "true";
