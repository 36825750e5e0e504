// The table of samples. A click opens the trace of one; its box puts it beside those that are open.
const VERDICT_CLASS = { correct: "good", incorrect: "bad" };

function verdictOf(sample) {
  if (sample.accuracy == null) return sample.reward == null ? "no verdict" : "not judged";
  return sample.accuracy >= 1 ? "correct" : sample.accuracy > 0 ? "partly correct" : "incorrect";
}

const tokensPerStep = (sample) => {
  const last = Math.max(0, ...sample.step_map);
  return ratio(last ? sample.ids.length / last : null);
};

// What every table shows, behind its own columns; `wide`: left out in a narrow window.
const COLUMNS = [
  { name: "tokens", value: (sample) => sample.ids.length },
  { name: "per step", wide: true, value: tokensPerStep },
  { name: "prompt", text: true, value: (sample) => (sample.prompt || "").slice(-160).trim() },
  { name: "completion", text: true, wide: true, value: (sample) => (sample.text || "").slice(0, 160).trim() },
];

const nameOf = (i) => DATA.samples[i].name ?? `sample ${i}`;

/** The table with `columns`, and menus for `filters`: [label, name, value of a sample]. `file` has all samples. */
function showSamples(root, { columns, filters, file }) {
  root.append(el("h2", { text: "Samples" }));
  if (!DATA.samples.length) {
    root.append(el("p", { class: "empty", text: "No samples yet." }));
    return;
  }
  if (DATA.samples.length < DATA.samples_total) {
    root.append(el("p", { class: "note", text:
      `${number(DATA.samples.length)} of ${number(DATA.samples_total)} samples, evenly spread; ${file} has all.` }));
  }
  const menus = filters.map(([label, name, value]) => {
    const values = [...new Set(DATA.samples.map(value))];
    const menu = el("select", { name, onchange: filter }, el("option", { value: "", text: "all" }),
      ...values.map((text) => el("option", { value: text, text })));
    return { label, menu, value };
  });
  const search = el("input", { type: "search", name: "search", oninput: filter });
  const count = el("span", { class: "note count", "aria-live": "polite" });
  const classes = ({ wide, text }) => [wide && "wide", text && "text"].filter(Boolean).join(" ");
  const rows = DATA.samples.map((sample, i) => el("tr", { "data-sample": i, onclick: () => {
    openSamples([i]);
    viewer.root.scrollIntoView({ block: "nearest" });
  } },
    el("td", {}, el("a", { href: `#sample=${i}`, text: sample.name ?? i, "aria-label": `open the trace of ${nameOf(i)}` })),
    el("td", { class: "beside", onclick: (event) => event.stopPropagation() }, el("input", { type: "checkbox",
      "aria-label": `${nameOf(i)} beside the others`, onchange: (event) => showBeside(i, event.target.checked) })),
    ...columns.map((column) => {
      const value = column.value(sample);
      return el("td", { class: `${classes(column)} ${column.cls?.(value) ?? ""}`, text: value });
    })));
  function filter() {
    const wanted = search.value.toLowerCase();
    let shown = 0;
    DATA.samples.forEach((sample, i) => {
      const fits = menus.every(({ menu, value }) => !menu.value || value(sample) === menu.value)
        && `${sample.prompt}\n${sample.text}`.toLowerCase().includes(wanted);
      rows[i].hidden = !fits;
      shown += fits;
    });
    count.textContent = `${shown} of ${rows.length} shown`;
  }
  filter();
  const head = (text, cls) => el("th", { scope: "col", class: cls, text });
  root.append(
    el("div", { class: "filters" }, ...menus.map(({ label, menu }) => el("label", {}, label, menu)),
      el("label", {}, "Search", search), count),
    el("div", { class: "card rows" }, el("table", {},
      el("thead", {}, el("tr", {}, head("sample"), head("beside"), ...columns.map((column) => head(column.name, classes(column))))),
      el("tbody", {}, ...rows))));
  markOpen();
}

/** Show in the table which samples are open. */
function markOpen() {
  const open = new Set(viewer.panes.map((pane) => pane.index));
  document.querySelectorAll(".rows tr[data-sample]").forEach((row) => {
    const isOpen = open.has(Number(row.dataset.sample));
    row.classList.toggle("chosen", isOpen);
    row.querySelector("input").checked = isOpen;
  });
}
