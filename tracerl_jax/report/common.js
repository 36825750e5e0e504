"use strict";
// Errors are kept on the document, where a test (or a person with the inspector) finds them.
window.addEventListener("error", (event) => {
  document.documentElement.dataset.errors = (document.documentElement.dataset.errors || "") + event.message + "\n";
});

const DATA = JSON.parse(document.getElementById("data").textContent);

/** An element with properties ("class", "text", "on<event>", attributes) and children; text is never parsed as HTML. */
function el(tag, props = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "text", "circle", "rect"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key === "text") node.textContent = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

/** A part of the page, in the order in which the scripts ask for them. */
function section(id) {
  const node = el("section", { id });
  document.querySelector("main").append(node);
  return node;
}

/** The heading with the theme button, then what is known, as [name, value] pairs; a value of null is left out. */
function showTop(title, status, facts, links) {
  document.title = title;
  const themes = { "": "Theme: system", light: "Theme: light", dark: "Theme: dark" };
  const theme = el("button", { type: "button", class: "theme", text: themes[""], onclick: () => {
    const names = Object.keys(themes), page = document.documentElement;
    page.dataset.theme = names[(names.indexOf(page.dataset.theme || "") + 1) % names.length];
    theme.textContent = themes[page.dataset.theme];
  } });
  document.getElementById("top").append(...[
    el("div", { class: "title" }, el("h1", { text: DATA.name }),
      status ? el("span", { class: `status ${status}`, text: status }) : null, theme),
    el("ul", { class: "facts" }, ...facts.filter(([, value]) => value != null).map(([name, value]) =>
      el("li", {}, el("span", { text: name + " " }), typeof value === "number" ? number(value) : value))),
    links && el("nav", { "aria-label": "Parts of the page" }, ...links.map(([id, text]) => el("a", { href: `#${id}`, text }))),
  ].filter(Boolean));
}

const MISSING = "–";

function number(value) {
  if (value == null) return MISSING;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(1).replace("e+", "e");
  if (Number.isInteger(value) || size >= 1000) return Math.round(value).toLocaleString("en");
  return value.toFixed(size >= 100 ? 1 : size >= 1 ? 2 : 3);
}

function percent(value, digits = 1) {
  return value == null ? MISSING : (100 * value).toFixed(digits) + "%";
}

function seconds(value) {
  if (value == null) return MISSING;
  if (value < 60) return value.toFixed(value < 10 ? 2 : 1) + " s";
  const minutes = Math.round(value / 60);
  return minutes < 60 ? minutes + " min" : Math.floor(minutes / 60) + " h " + (minutes % 60) + " min";
}

function ratio(value) {
  return value == null ? MISSING : value.toFixed(2);
}

const FORMATS = { number, percent, seconds, log: number };

const tip = document.getElementById("tip");

/** Show `text` near the box of an element or a point, inside the window. */
function showTip(text, box) {
  tip.textContent = text;
  tip.hidden = false;
  const left = Math.min(Math.max(8, box.left), window.innerWidth - tip.offsetWidth - 8);
  const below = box.bottom + 8;
  tip.style.left = left + "px";
  tip.style.top = (below + tip.offsetHeight < window.innerHeight ? below : box.top - tip.offsetHeight - 8) + "px";
}

function hideTip() {
  tip.hidden = true;
}
