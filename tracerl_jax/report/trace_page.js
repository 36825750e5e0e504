// The page of `tracerl generate --trace`: the completions, those of the first prompt side by side.
const stepsOf = (sample) => Math.max(0, ...sample.step_map);
const sum = (value) => DATA.samples.reduce((total, sample) => total + value(sample), 0);

showTop(`${DATA.name} – traces`, null, [
  ["completions", DATA.samples_total], ["tokens", sum((sample) => sample.ids.length)],
  ["tokens per step", ratio(sum((sample) => sample.ids.length) / Math.max(sum(stepsOf), 1))], ["page made", DATA.made],
]);
const first = DATA.samples.map((sample, i) => i).filter((i) => DATA.samples[i].prompt === DATA.samples[0].prompt);
const table = section("samples");
showViewer(section("viewer"), first.slice(0, 4));
if (DATA.samples.length > 1) {
  document.querySelector("main").append(table);
  showSamples(table, { columns: [{ name: "forwards", wide: true, value: (sample) => number(sample.forwards) }, ...COLUMNS],
    filters: [], file: "the output" });
}
document.documentElement.dataset.ready = "true";
