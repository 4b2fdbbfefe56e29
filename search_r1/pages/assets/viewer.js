// The page: a list with filters, and the trajectory that was chosen. The address holds the choice.

import { append, chip, counted, el, fill, num } from "./dom.js";
import { themeSwitch } from "./theme.js";
import { blockText, entriesWith, loadRecord } from "./data.js";
import { CHOICES, NO_FILTERS, ORDERS, groupsOf, isPartial, isRight, matches, valuesOf } from "./filters.js";
import { virtualList } from "./list.js";
import { renderTrajectory } from "./trajectory.js";
import { renderSideBySide } from "./compare.js";

const TABS = { trajectory: "Trajectory", group: "Group", steps: "Same question over steps" };
const MOST_COLUMNS = 64;
const KEYS = [
  ["j or ↓", "next trajectory"],
  ["k or ↑", "previous trajectory"],
  ["t", "the trajectory"],
  ["g", "its group, side by side"],
  ["s", "the same question at successive steps"],
  ["c", "choose what tokens are coloured by"],
  ["/", "search"],
  ["← →", "from token to token, in a turn that has the focus"],
  ["?", "this help"],
  ["Esc", "leave a field, the help, or a comparison"],
];
const NAMES = { kind: "Phase", step: "Step", source: "Source", stop: "Stop reason", hops: "Hops", searches: "Searches", detail: "Detail" };

const state = {
  index: [],
  groups: new Map(),
  shown: [],
  chosen: null,
  tab: "trajectory",
  colour: "author",
  filters: { ...NO_FILTERS },
  order: "written",
  everywhere: false,
};
const view = {};

async function start() {
  const app = document.getElementById("app");
  if (typeof DecompressionStream === "undefined") {
    fill(app, el("p", { class: "fatal" }, "This browser is too old for this page: it lacks DecompressionStream."));
    return;
  }
  try {
    const about = JSON.parse(await blockText("about"));
    state.index = JSON.parse(await blockText("index"));
    state.groups = groupsOf(state.index);
    layOut(app, about);
  } catch (error) {
    fill(app, el("p", { class: "fatal", role: "alert" }, `This page cannot be read: ${error.message}. It may have been cut off; make it anew.`));
    return;
  }
  addEventListener("hashchange", openAddress);
  addEventListener("keydown", onKey);
  refilter();
  openAddress();
  document.documentElement.dataset.ready = "true";
}

function layOut(app, about) {
  view.list = virtualList(renderRow, open);
  view.count = el("p", { class: "count", role: "status" });
  view.main = el("main", { class: "main", tabindex: "-1" });
  view.help = renderHelp();
  fill(
    app,
    el("header", { class: "top" },
      el("h1", {}, about.title, el("span", { class: "top-sub" }, " trajectories")),
      renderPageLinks(about),
      el("button", { class: "quiet-button", type: "button", onclick: () => view.help.showModal() }, "? Keys"),
      themeSwitch(),
    ),
    el("div", { class: "columns" },
      el("nav", { class: "side", "aria-label": "List of trajectories" }, renderFilters(), view.count, view.list.element),
      view.main,
    ),
    view.help,
  );
}

/** Links to the other files of the same result. */
function renderPageLinks(about) {
  if (about.pages.length < 2) return null;
  const links = about.pages.map((name, place) =>
    place + 1 === about.page
      ? el("span", { "aria-current": "page" }, `${place + 1}`)
      : el("a", { href: encodeURIComponent(name) }, `${place + 1}`));
  return el("nav", { class: "page-links", "aria-label": "Pages" }, "Page ", links);
}

function renderRow(entry) {
  if (entry.problem) {
    return [
      el("div", { class: "row-title" }, `Unreadable record, ${entry.name}`),
      el("div", { class: "row-sub" }, chip("unreadable", "bad"), el("span", { class: "row-answer" }, entry.problem)),
    ];
  }
  const right = isRight(entry);
  return [
    el("div", { class: "row-title" }, entry.question),
    el("div", { class: "row-sub" },
      el("span", { class: right ? "verdict right" : "verdict wrong" }, right ? "✓" : "✗"),
      el("span", { class: "row-answer" }, entry.answer ?? `no answer (${entry.stop})`),
      isPartial(entry) && chip(`reward ${num(entry.score, 2)}`),
      el("span", { class: "row-facts" },
        entry.step === null ? null : `step ${entry.step} · `, counted(entry.searches, "search", "searches")),
    ),
  ];
}

// Filters

function renderFilters() {
  const search = el("input", {
    type: "search", id: "search", placeholder: "Search questions, answers, queries  ( / )", "aria-label": "Search",
    oninput: () => setFilter("text", search.value),
  });
  const everywhere = el("input", { type: "checkbox", onchange: () => { state.everywhere = everywhere.checked; refilter(); } });
  const selects = CHOICES.filter((name) => valuesOf(state.index, name).length > 1).map(renderChoice);
  const reward = choice("reward", "Reward", [["right", "full"], ["between", "partial"], ["wrong", "none"], ["unreadable", "unreadable"]]);
  const outcome = choice("outcome", "Group", [["mixed", "rewards differ"], ["same", "rewards alike"]]);
  const order = el("select", { onchange: () => { state.order = order.value; refilter(); } },
    Object.keys(ORDERS).map((name) => el("option", { value: name }, name)));
  view.groupFilter = el("div", { class: "group-filter" });
  return el("div", { class: "filters" }, search,
    el("label", { class: "check" }, everywhere, "also in thoughts and passages"),
    el("details", { class: "more-filters", open: window.innerWidth > 800 },
      el("summary", {}, "Filters"),
      el("div", { class: "filter-grid" }, selects, reward, outcome, el("label", {}, "Order", order),
        el("button", { class: "quiet-button", type: "button", onclick: resetFilters }, "Clear filters"))),
    view.groupFilter);
}

function renderChoice(name) {
  return choice(name, NAMES[name], valuesOf(state.index, name).map(([value, count]) => [String(value), `${value} (${count})`]));
}

function choice(name, label, options) {
  const select = el("select", { "data-filter": name, onchange: () => setFilter(name, select.value) },
    el("option", { value: "" }, "any"), options.map(([value, text]) => el("option", { value }, text)));
  return el("label", {}, label, select);
}

function setFilter(name, value) {
  state.filters[name] = value;
  refilter();
}

function resetFilters() {
  state.filters = { ...NO_FILTERS };
  for (const select of document.querySelectorAll("[data-filter]")) select.value = "";
  document.getElementById("search").value = "";
  refilter();
}

let filtering = 0;

/** Applies the filters. A search of whole records unpacks all of them, while the page stays alive. */
async function refilter() {
  const turn = ++filtering;
  const { filters } = state;
  let everywhere = null;
  if (state.everywhere && filters.text) {
    view.count.textContent = "Searching …";
    everywhere = await entriesWith(state.index, filters.text, () => turn !== filtering);
    if (turn !== filtering) return;
  }
  state.shown = state.index.filter((entry) => matches(entry, filters, state.groups, everywhere));
  const order = ORDERS[state.order];
  if (order) state.shown.sort(order);
  view.list.show(state.shown);
  const right = state.shown.filter(isRight).length;
  const share = state.shown.length ? `, ${Math.round((100 * right) / state.shown.length)} % right` : "";
  view.count.textContent = `${state.shown.length} of ${state.index.length}${share}`;
  fill(view.groupFilter, filters.group && el("button", { class: "quiet-button", type: "button", onclick: () => setFilter("group", "") },
    "Only one group is shown  ✕"));
}

// The trajectory

function open(entry) {
  if (!entry) return;
  const address = `#${encodeURIComponent(entry.name)}${state.tab === "trajectory" ? "" : `/${state.tab}`}`;
  if (location.hash !== address) history.replaceState(null, "", address);
  state.chosen = entry;
  view.list.choose(entry);
  show();
}

/** Opens what the address names, or the first of the list. */
function openAddress() {
  const [name, tab] = location.hash.slice(1).split("/");
  if (tab in TABS) state.tab = tab;
  else if (name) state.tab = "trajectory";
  const wanted = decodeURIComponent(name ?? "");
  const entry = state.index.find((candidate) => candidate.name === wanted);
  if (wanted && !entry) {
    fill(view.main, el("p", { class: "fatal", role: "alert" }, `No record is called ${wanted} on this page.`));
    return;
  }
  open(entry ?? state.shown[0]);
}

function chooseTab(tab) {
  if (!state.chosen) return;
  state.tab = tab;
  open(state.chosen);
}

let showing = 0;

async function show() {
  const turn = ++showing;
  const entry = state.chosen;
  const body = el("div", { class: "body", role: "tabpanel", "aria-label": TABS[state.tab] });
  try {
    const content = entry.problem ? await renderProblem(entry) : await renderTab(entry);
    if (turn !== showing) return;
    append(body, content);
  } catch (error) {
    if (turn !== showing) return;
    append(body, el("p", { class: "fatal", role: "alert" }, `This record cannot be shown: ${error.message}`), await rawRecord(entry));
  }
  fill(view.main, renderTabs(entry), body);
  view.main.scrollTop = 0;
}

function renderTabs(entry) {
  const sizes = { group: state.groups.get(entry.group)?.length, steps: sameQuestion(entry).length };
  return el("div", { class: "tabs", role: "tablist", "aria-label": "Views" },
    Object.entries(TABS).map(([name, label]) => el("button", {
      role: "tab", type: "button", "aria-selected": String(state.tab === name), onclick: () => chooseTab(name),
    }, label, sizes[name] !== undefined && el("span", { class: "tab-count" }, ` ${sizes[name]}`))));
}

async function renderTab(entry) {
  if (state.tab === "group") return renderMembers(entry, state.groups.get(entry.group) ?? [entry], memberTitle, groupNote(entry));
  if (state.tab === "steps") return renderMembers(entry, sameQuestion(entry), stepTitle, null);
  const record = await loadRecord(entry);
  return renderTrajectory(record, { colour: state.colour, onColour: (name) => { state.colour = name; } });
}

async function renderMembers(entry, entries, titleOf, note) {
  const some = entries.slice(0, MOST_COLUMNS);
  const members = await Promise.all(some.map(async (member) => ({ entry: member, record: await loadRecord(member) })));
  const left = entries.length - some.length;
  return [
    el("h2", {}, entry.question),
    el("p", { class: "gold-line" }, "Gold: ", (entry.gold ?? []).join("  ·  ") || "–"),
    note,
    left > 0 && el("p", { class: "hint" }, `${left} more are not shown here.`),
    renderSideBySide(members, {
      current: entry,
      titleOf,
      onOpen: (member) => { state.tab = "trajectory"; open(member); },
    }),
  ];
}

function groupNote(entry) {
  const scores = (state.groups.get(entry.group) ?? [entry]).map((member) => member.score ?? 0);
  const mean = scores.reduce((sum, score) => sum + score, 0) / scores.length;
  return el("p", { class: "hint" }, `${counted(scores.length, "sample")} of one prompt, mean reward ${num(mean)}. `,
    el("button", { class: "link-button", type: "button", onclick: () => setFilter("group", entry.group) }, "Show only this group in the list"));
}

function memberTitle(entry) {
  return `Sample ${state.groups.get(entry.group).indexOf(entry) + 1}`;
}

function stepTitle(entry) {
  return entry.step === null ? entry.name : `${entry.kind} step ${entry.step}`;
}

/** All entries of the question, in the order of their steps. */
function sameQuestion(entry) {
  if (!entry.question) return [entry];
  return state.index
    .filter((other) => other.question === entry.question && other.source === entry.source)
    .sort((a, b) => (a.step ?? 0) - (b.step ?? 0));
}

async function renderProblem(entry) {
  return [
    el("div", { class: "problem", role: "alert" },
      el("h2", {}, `This record cannot be read`),
      el("p", {}, entry.problem)),
    await rawRecord(entry),
  ];
}

/** What there is of a record that cannot be shown, as text. */
async function rawRecord(entry) {
  let text;
  try {
    const record = await loadRecord(entry);
    text = record.excerpt ?? JSON.stringify(record, null, 1).slice(0, 20000);
    return el("div", {}, el("p", { class: "hint" }, `${record.file}, line ${record.line}, begins:`), el("pre", { class: "raw", tabindex: "0" }, text));
  } catch (error) {
    return el("p", { class: "hint" }, `Nothing of it can be shown: ${error.message}`);
  }
}

// Keys

function renderHelp() {
  const dialog = el("dialog", { class: "help", "aria-labelledby": "help-title" },
    el("h2", { id: "help-title" }, "Keys"),
    el("table", {}, el("tbody", {}, KEYS.map(([key, what]) =>
      el("tr", {}, el("th", { scope: "row" }, el("kbd", {}, key)), el("td", {}, what))))),
    el("form", { method: "dialog" }, el("button", { class: "quiet-button" }, "Close")));
  return dialog;
}

function step(by) {
  const place = state.shown.indexOf(state.chosen);
  const next = place < 0 ? 0 : place + by;
  if (next >= 0 && next < state.shown.length) open(state.shown[next]);
}

const ACTIONS = {
  j: () => step(1),
  ArrowDown: () => step(1),
  k: () => step(-1),
  ArrowUp: () => step(-1),
  t: () => chooseTab("trajectory"),
  g: () => chooseTab(state.tab === "group" ? "trajectory" : "group"),
  s: () => chooseTab(state.tab === "steps" ? "trajectory" : "steps"),
  c: () => document.querySelector(".colour-by")?.focus(),
  "/": () => document.getElementById("search").focus(),
  "?": () => view.help.showModal(),
  Escape: () => { if (state.tab !== "trajectory") chooseTab("trajectory"); },
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || view.help.open) return;
  const isField = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (isField) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const action = ACTIONS[event.key];
  if (!action) return;
  const scrolls = event.key.startsWith("Arrow") && view.main.contains(event.target);
  if (scrolls) return; // arrows scroll what is read
  event.preventDefault();
  action();
}

start();
