// The page of runs: messages become rows and states, and these become tables and charts.
/* global uPlot */

import { append, chip, el, fill, num } from "./dom.js";
import { themeSwitch } from "./theme.js";
import { blockText } from "./data.js";
import { renderTrajectory } from "./trajectory.js";
import { AXES, figure, metricsOf, withRows } from "./series.js";
import { Chart, MetricChart, lineOf, valueOf } from "./charts.js";
import { TimerChart } from "./timers.js";
import { renderAlarms, renderComparison, renderRuns } from "./runs.js";

const MOST_SAMPLES = 900;
/** The charts: a name, and a metric or an expression that finds some. */
const GROUPS = [
  ["Reward", [["Mean score", "critic/score/mean"], ["Spread of the score", "critic/score/std"], ["Trajectories that teach", "critic/advantages/nonzero_share"]]],
  ["Exact match", [["Training", "reward/em"], ["Validation", /^val\/em\/(.+)/], ["Validation score", "val/test_score/all"]]],
  ["Search", [["Searches", "env/number_of_valid_search"], ["Searches in validation", "val/env/number_of_valid_search"], ["Answered", "env/finish_ratio"], ["Gold passages found", "env/gold_recall"]]],
  ["Length", [["Tokens after the prompt", "response_length/mean"], ["Tokens of the policy", "response_length_model/mean"], ["Out of context", "response_length/clip_ratio"]]],
  ["Policy", [["Entropy", "actor/entropy"], ["KL to the reference, loss", "actor/kl_loss"], ["KL to the reference, reward", "critic/kl"], ["KL of an update", "actor/ppo_kl"], ["Gradient norm", "actor/grad_norm"]]],
  ["Mismatch of engine and trainer", [["Mean difference", "rollout/logprob_diff_mean"], ["Largest difference", "rollout/logprob_diff_max"], ["KL", "rollout_corr/k3_kl"]]],
  ["Retriever", [["Latency, median", "env/retrieval_latency_s/p50"], ["Latency, 95 %", "env/retrieval_latency_s/p95"], ["Failed attempts", "env/search_errors"]]],
  ["Time and memory", [["Tokens per second and device", "perf/throughput"], ["GPU memory of tensors, GB", "actor/max_memory_allocated_gb"], ["GPU memory reserved, GB", "actor/max_memory_reserved_gb"], ["Memory of the machine, GB", "perf/cpu_memory_used_gb"]]],
];

/** A run on the page. */
class Run {
  constructor(name, number) {
    this.name = name;
    this.number = number;
    this.isShown = true;
    this.rows = [];
    this.status = {};
    this.records = [];
    this.says = "";
    this.samples = [];
    this.timers = new TimerChart(name);
  }
}

class WatchPage {
  constructor(about) {
    this.runs = about.runs.map((name, number) => new Run(name, number));
    this.table = [];
    this.view = { axis: "step", smoothing: 0 };
    this.charts = new Map();
    this.due = new Set();
    this.state = el("span", { class: "hint", role: "status" }, about.live ? "connecting …" : `as of ${about.made}`);
    this.places = Object.fromEntries(["runs", "alarms", "retriever", "comparison"].map((name) => [name, el("div")]));
    this.trajectories = el("div", { class: "newest" });
    this.groups = GROUPS.map(([title]) => new Group(title));
    this.more = new Group("More metrics");
    this.timers = new Group("Where the time goes");
    this.element = this.render();
    append(this.timers.grid, ...this.runs.map((run) => run.timers.element));
  }

  render() {
    const charts = [...this.groups, this.timers, this.more].map((group) => group.element);
    const { runs, alarms, retriever, comparison } = this.places;
    return [
      el("header", { class: "top" }, el("h1", {}, "Runs"), this.state, themeSwitch()),
      el("main", { class: "watch" }, runs, alarms, this.renderControls(), ...charts, this.renderAdd(), retriever, comparison,
        el("section", { "aria-label": "Newest trajectories" }, el("h2", {}, "Newest trajectories"), this.trajectories)),
    ];
  }

  renderControls() {
    const axis = el("select", { id: "axis" }, ...Object.entries(AXES).map(([name, { label }]) => el("option", { value: name }, label)));
    axis.addEventListener("change", () => this.look({ axis: axis.value }));
    const slider = el("input", { id: "smoothing", type: "range", min: "0", max: "0.99", step: "0.01", value: "0" });
    const shown = el("span", { "aria-hidden": "true", class: "shown" }, "0");
    slider.addEventListener("input", () => {
      shown.textContent = slider.value;
      this.look({ smoothing: Number(slider.value) });
    });
    return el("div", { class: "controls", role: "group", "aria-label": "Curves" },
      el("label", { for: "axis" }, "Over"), axis, el("label", { for: "smoothing" }, "Smoothing"), slider, shown);
  }

  renderAdd() {
    this.choice = el("select", { id: "more" });
    const add = () => {
      if (this.choice.value) this.chartOf(this.more, this.choice.value, this.choice.value);
      this.drawCharts();
    };
    return el("div", { class: "controls" }, el("label", { for: "more" }, "Another metric"), this.choice,
      el("button", { class: "quiet-button", type: "button", onclick: add }, "Show"));
  }

  look(change) {
    Object.assign(this.view, change);
    this.drawCharts();
  }

  /** Takes messages of the server, and draws what they change, once for all of them. */
  take(messages) {
    if (this.due.size === 0) setTimeout(() => this.drawDue());
    for (const message of messages) {
      this.takeOne(message);
      this.due.add(message.kind);
    }
  }

  drawDue() {
    const { due } = this;
    this.due = new Set();
    if (due.has("status") || due.has("comparison")) this.drawTables();
    if (due.has("rows")) this.drawCharts();
    if (due.has("retriever")) this.drawRetriever();
    if (due.has("trajectories")) this.showTrajectories();
  }

  takeOne(message) {
    const run = this.runs[message.run];
    if (message.kind === "rows") run.rows = withRows(run.rows, message.from, message.rows);
    else if (message.kind === "status") run.status = message;
    else if (message.kind === "trajectories") run.records = message.records;
    else if (message.kind === "comparison") this.table = message.table;
    else if (message.kind === "retriever") {
      run.says = message.says;
      run.samples = [...(message.anew ? [] : run.samples), ...message.samples].slice(-MOST_SAMPLES);
    }
  }

  draw() {
    this.drawTables();
    this.drawCharts();
    this.drawRetriever();
  }

  drawTables() {
    const keep = document.activeElement?.id;
    fill(this.places.runs, renderRuns(this.runs, (run, isShown) => {
      run.isShown = isShown;
      this.draw();
    }));
    fill(this.places.alarms, renderAlarms(this.runs));
    fill(this.places.comparison, renderComparison(this.runs, this.table));
    if (keep && document.activeElement === document.body) document.getElementById(keep)?.focus();
  }

  drawCharts() {
    const names = metricsOf(this.runs.flatMap((run) => run.rows));
    GROUPS.forEach(([, entries], place) => {
      for (const [title, metric] of entries) this.addCharts(this.groups[place], title, metric, names);
    });
    this.offer(names);
    const shown = this.runs.filter((run) => run.isShown);
    for (const chart of this.charts.values()) chart.update(shown, this.view);
    for (const run of this.runs) run.timers.update(run.isShown ? run.rows : [], this.view.axis);
    for (const group of [...this.groups, this.timers, this.more]) group.hideIfEmpty();
  }

  addCharts(group, title, metric, names) {
    if (typeof metric === "string") {
      if (names.includes(metric)) this.chartOf(group, title, metric);
      return;
    }
    for (const name of names) {
      const found = name.match(metric);
      if (found) this.chartOf(group, `${title}: ${found[1]}`, name);
    }
  }

  chartOf(group, title, metric) {
    if (this.charts.has(metric)) return;
    const chart = new MetricChart(title, metric);
    this.charts.set(metric, chart);
    append(group.grid, chart.element);
  }

  /** Offers the metrics that have no chart yet. */
  offer(names) {
    const others = names.filter((name) => !this.charts.has(name));
    const present = [...this.choice.options].map((option) => option.value);
    if (JSON.stringify(others) === JSON.stringify(present)) return;
    fill(this.choice, ...others.map((name) => el("option", { value: name }, name)));
  }

  drawRetriever() {
    const asked = this.runs.filter((run) => run.says);
    if (asked.length === 0) return;
    if (!this.retriever) {
      this.retriever = { text: el("p", { class: "hint" }), charts: [new Chart("Queries that wait"), new Chart("Seconds of a request")] };
      fill(this.places.retriever, el("section", { "aria-label": "Retrieval servers" }, el("h2", {}, "Retrieval servers, now"),
        this.retriever.text, el("div", { class: "grid" }, ...this.retriever.charts.map((chart) => chart.element))));
    }
    this.retriever.text.textContent = asked.map((run) => `${run.name}: ${run.says}`).join(" · ");
    this.retriever.charts.forEach((chart, column) => drawSamples(chart, asked, column + 1));
  }

  /** Shows the newest trajectories. What is open stays until it is closed. */
  showTrajectories() {
    const present = new Map([...this.trajectories.children].map((node) => [node.dataset.key, node]));
    const nodes = this.runs.flatMap((run) => run.records.map((record) => {
      const key = `${run.number} ${record.name} ${JSON.stringify(record.content).length}`;
      const node = present.get(key) ?? renderNewest(run, record, this.runs.length > 1);
      node.dataset.key = key;
      present.delete(key);
      return node;
    }));
    const kept = [...present.values()].filter((node) => node.open);
    this.trajectories.replaceChildren(...nodes, ...kept);
    if (nodes.length + kept.length === 0) append(this.trajectories, el("p", { class: "hint" }, "None were recorded yet (trainer.rollout_data_freq, trainer.test_freq)."));
  }

  redraw() {
    for (const chart of this.charts.values()) chart.redraw();
    for (const run of this.runs) run.timers.redraw();
    this.retriever?.charts.forEach((chart) => chart.redraw());
    this.draw();
  }
}

/** Some charts under a heading, which is hidden while none of them has anything to show. */
class Group {
  constructor(title) {
    this.grid = el("div", { class: "grid" });
    this.element = el("section", { "aria-label": title, hidden: true }, el("h2", {}, title), this.grid);
  }

  hideIfEmpty() {
    this.element.hidden = [...this.grid.children].every((chart) => chart.hidden);
  }
}

/** What the retrieval servers of each run said lately, in minutes before now. */
function drawSamples(chart, runs, column) {
  const known = runs.filter((run) => run.samples.length > 0);
  chart.element.hidden = known.length === 0;
  if (known.length === 0) return;
  const newest = Math.max(...known.flatMap((run) => run.samples.map(([time]) => time)));
  const data = uPlot.join(known.map((run) => [
    run.samples.map(([time]) => (time - newest) / 60),
    run.samples.map((sample) => sample[column]),
  ]));
  const series = known.map((run) => ({ ...lineOf(run), spanGaps: true, points: { show: false } }));
  const read = (index) => [
    el("span", { class: "at" }, index === null ? "newest" : `${figure(data[0][index])} min`),
    ...known.map((run, place) => valueOf(run, data[place + 1], index)),
  ];
  chart.show(data, series, "minutes before now", read);
}

/** A trajectory that is opened by its question. */
function renderNewest(run, record, isNamed) {
  const { content } = record;
  const isRight = (content.reward?.em ?? content.reward?.score ?? 0) >= 1;
  const summary = content.problem
    ? [chip("cannot be read", "bad"), content.problem]
    : [
      chip(`reward ${num(content.reward?.score)}`, isRight ? "good" : "bad"),
      ` ${content.question || "a prompt without a question"} `,
      el("span", { class: "hint" }, `answer ${content.answer ?? "none"}, gold ${(content.gold ?? []).join(" · ") || "–"}`),
    ];
  const place = el("div");
  const details = el("details", { class: "newest-one" },
    el("summary", {}, chip(`${isNamed ? `${run.name}, ` : ""}${record.name}`), " ", ...summary), place);
  details.addEventListener("toggle", () => {
    if (details.open && !place.firstChild) fill(place, contentOf(content));
  });
  return details;
}

function contentOf(content) {
  return content.problem ? el("pre", { class: "raw", tabindex: "0" }, content.excerpt) : renderTrajectory(content);
}

/** Follows the server. The browser connects again by itself when the connection is lost. */
function follow(page) {
  const source = new EventSource("events");
  source.addEventListener("message", (event) => {
    page.state.textContent = "live";
    page.take(JSON.parse(event.data));
  });
  source.addEventListener("error", () => {
    const isOver = source.readyState === EventSource.CLOSED;
    page.state.textContent = isOver ? "not connected: open the printed address" : "connection lost, trying again …";
  });
}

async function start() {
  const about = JSON.parse(await blockText("about"));
  const page = new WatchPage(about);
  fill(document.getElementById("app"), ...page.element);
  page.showTrajectories();
  page.take(JSON.parse(await blockText("messages")));
  new MutationObserver(() => page.redraw()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => page.redraw());
  if (about.live) follow(page);
  document.documentElement.dataset.ready = "true";
}

function fail(error) {
  fill(document.getElementById("app"), el("p", { class: "fatal", role: "alert" }, `This page cannot be read: ${error.message}`));
  document.documentElement.dataset.ready = "true";
}

start().catch(fail);
