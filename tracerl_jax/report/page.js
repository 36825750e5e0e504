// The page of a run: header, results, configuration; then everything is put together.
function showHeader() {
  const config = (key) => (DATA.config[key] === "" ? null : DATA.config[key]);
  const progress = Object.entries(DATA.progress).map(([phase, step]) => {
    const total = config(`${phase}.steps`);
    return [`${phase === "sft" ? "warm-up" : "RL"} step`, number(step) + (total ? ` of ${number(total)}` : "")];
  });
  showTop(`${DATA.name} – run report`, DATA.status, [
    ...progress, ["time in RL steps", DATA.seconds ? seconds(DATA.seconds) : null],
    ["model", config("model.path") ?? config("model.preset")], ["task", config("task.name")], ["method", config("rl.method")],
    ["decoding", config("rollout.strategy")], ["block size", config("rollout.block_size")],
    ["learning rate", config("rl.optimizer.learning_rate")], ["seed", config("seed")], ["page made", DATA.made],
  ], [["results", "Results"], ["curves", "Curves"], ["samples", "Samples"], ["viewer", "Trace"], ["config", "Configuration"]]);
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
        row("Standard error", "", "accuracy_stderr", percent, el("td")),
        row("Tokens per step", "", "tokens_per_step", ratio, change(get(first, "tokens_per_step"), get(last, "tokens_per_step"),
          (from, to) => `${signed(100 * (to / from - 1), 0)}%`, ["good", "bad"])),
        row("Problems", "", "n", number, el("td")))));
  });
  root.append(el("div", { class: "results" }, ...tables));
}

function showHosts(root) {
  const { phase, steps, phases, processes, rows } = DATA.hosts;
  root.append(el("h2", { text: "Processes" }),
    el("p", { text: `Mean seconds over the last ${steps} rows of ${phase}, the slowest in rollout, reward or pack first`
      + (rows.length < processes ? `; ${rows.length} of ${processes} processes.` : ".") }),
    el("div", { class: "card hosts" }, el("table", {},
      el("thead", {}, el("tr", {}, ...["process", ...phases].map((name) => el("th", { scope: "col", text: name.replace(/_/g, " ") })))),
      el("tbody", {}, ...rows.map(([index, ...each]) => el("tr", {}, el("td", { text: index }),
        ...each.map((value) => el("td", { text: seconds(value) }))))))));
}

function showConfig(root) {
  const entries = Object.entries(DATA.config);
  if (!entries.length) return;
  root.append(el("details", {}, el("summary", { text: `Configuration (${entries.length} keys)` }),
    el("dl", { class: "config" }, ...entries.map(([key, value]) => el("div", {},
      el("dt", { text: key }), el("dd", { text: typeof value === "string" ? value : JSON.stringify(value) }))))));
}

const when = (sample) => `${sample.phase} ${sample.step}`;

showHeader();
showResults(section("results"));
showCurves(section("curves"));
if (DATA.hosts.rows) showHosts(section("hosts"));
showSamples(section("samples"), {
  columns: [
    { name: "step", value: when },
    { name: "verdict", value: verdictOf, cls: (verdict) => VERDICT_CLASS[verdict] },
    { name: "reward", wide: true, value: (sample) => number(sample.reward) },
    ...COLUMNS,
  ],
  filters: [["Step", "step", when], ["Verdict", "verdict", verdictOf]],
  file: "samples.jsonl",
});
if (DATA.samples.length) showViewer(section("viewer"), [DATA.samples.length - 1]);
showConfig(section("config"));
document.documentElement.dataset.ready = "true";
