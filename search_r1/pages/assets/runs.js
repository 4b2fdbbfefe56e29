// The runs as a table: which are shown, how far each is, what it costs; and how they compare.

import { chip, counted, el, num } from "./dom.js";
import { lineSample } from "./charts.js";
import { duration, figure } from "./series.js";

const TONES = { running: "accent", finished: "good", stopped: "quiet", failed: "bad", lost: "bad" };
const MEANINGS = {
  running: "a process trains in the folder",
  finished: "all steps are done",
  stopped: "it was asked to stop; the same command goes on",
  failed: "it ended by an error",
  lost: "no process uses the folder, and nothing says how it ended",
};

/**
 * The table of the runs.
 * @param {Object[]} runs
 * @param {(run: Object, isShown: boolean) => void} onToggle
 */
export function renderRuns(runs, onToggle) {
  const isPriced = runs.some((run) => run.status.cost?.money != null);
  const heads = ["Run", "State", "Progress", "Left", "Step", "Device-hours", "Tokens written", "Tokens trained", "Searches", isPriced && "Cost"];
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Runs" },
    el(
      "table",
      { class: "runs" },
      el("caption", { class: "visually-hidden" }, "Runs; the box before a name shows or hides its curves"),
      el("thead", {}, el("tr", {}, ...heads.filter(Boolean).map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, ...runs.map((run) => renderRun(run, onToggle, isPriced))),
    ),
  );
}

function renderRun(run, onToggle, isPriced) {
  const { status } = run;
  const cost = status.cost ?? {};
  const box = el("input", { type: "checkbox", id: `run-${run.number}`, checked: run.isShown });
  box.addEventListener("change", () => onToggle(run, box.checked));
  const about = [status.model, status.algorithm].filter(Boolean).join(", ");
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, box,
      el("label", { for: `run-${run.number}`, title: status.folder }, lineSample(run.number), run.name),
      about && el("span", { class: "hint about" }, about)),
    el("td", {}, status.state ? chip(status.state, TONES[status.state], MEANINGS[status.state]) : "–"),
    el("td", {}, progressOf(status)),
    el("td", {}, duration(status.eta_s)),
    el("td", {}, duration(status.seconds_per_step)),
    el("td", {}, figure(cost.device_hours)),
    el("td", {}, figure(cost.generated_tokens)),
    el("td", {}, figure(cost.trained_tokens)),
    el("td", {}, figure(cost.searches)),
    isPriced && el("td", {}, figure(cost.money)),
  );
}

function progressOf(status) {
  if (!status.total) return `step ${num(status.step)}`;
  const bar = el("progress", { max: status.total, value: status.step, "aria-label": `progress of ${status.name}` });
  return [`${num(status.step)} of ${num(status.total)} `, bar];
}

/** Alarms and unreadable lines of the runs; null where there is nothing to say. */
export function renderAlarms(runs) {
  const entries = runs.flatMap((run) => [
    ...(run.status.alarms ?? []).map(({ kind, text }) => ({ run, kind, text })),
    ...(run.status.problems ?? []).map((text) => ({ run, kind: "cannot be read", text })),
  ]);
  if (entries.length === 0) return null;
  return el(
    "section",
    { class: "alarms", "aria-label": "Alarms" },
    el("h2", {}, counted(entries.length, "alarm")),
    el("ul", {}, ...entries.map(({ run, kind, text }) =>
      el("li", {}, chip(kind, "bad"), el("span", { class: "alarm-run" }, run.name), el("span", { class: "alarm-text" }, text)))),
  );
}

/** How the last validations of the runs compare with that of the first; null without another. */
export function renderComparison(runs, table) {
  if (table.length === 0) return null;
  const heads = ["Run", "Questions", "EM difference", "95 % interval", "Gained", "Lost", "p"];
  const rows = table.flatMap((entry, place) => comparedRows(runs[place + 1], entry));
  return el(
    "section",
    { class: "comparison", "aria-label": "Comparison" },
    el("h2", {}, `Last validations, against ${runs[0].name}`),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Comparison of validations" },
      el("table", {},
        el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
        el("tbody", {}, ...rows))),
    el("p", { class: "hint" },
      "Paired by question: difference of exact match with a bootstrap interval, and McNemar's exact test over the questions that changed. search-r1 compare says more."),
  );
}

function comparedRows(run, entry) {
  const steps = entry.step === undefined ? "" : ` (step ${num(entry.step)} against ${num(entry.against)})`;
  if (entry.problem) {
    const name = el("th", { scope: "row" }, run.name + steps);
    return [el("tr", {}, name, el("td", { colspan: "6" }, entry.problem))];
  }
  return entry.rows.map((row) => el(
    "tr",
    {},
    el("th", { scope: "row" }, row.set === "all" ? run.name + steps : el("span", { class: "of-set" }, row.set)),
    el("td", {}, num(row.questions)),
    el("td", {}, signed(row.difference)),
    el("td", {}, `${signed(row.interval[0])} to ${signed(row.interval[1])}`),
    el("td", {}, num(row.gained)),
    el("td", {}, num(row.lost)),
    el("td", {}, row.p < 0.001 ? "< 0.001" : num(row.p)),
  ));
}

function signed(value) {
  return value > 0 ? `+${num(value)}` : num(value);
}
