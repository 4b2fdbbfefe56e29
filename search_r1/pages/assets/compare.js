// Trajectories side by side: those of a group, or those of one question at successive steps.

import { append, chip, el, num } from "./dom.js";
import { partsOf } from "./parts.js";
import { authorOf } from "./tokens.js";

/** The mean advantage of the trained tokens of a record; null where they are not written. */
export function meanAdvantage(record) {
  let sum = 0;
  let count = 0;
  for (const segment of record.segments ?? []) {
    (segment.advantages ?? []).forEach((value, place) => {
      if (typeof value !== "number" || segment.mask?.[place] === 0) return;
      sum += value;
      count += 1;
    });
  }
  return count ? sum / count : null;
}

/**
 * A column for each record.
 * @param {Array<{entry: Object, record: Object}>} members
 * @param {Object} options
 * @param {Object} options.current  the entry that is open
 * @param {(entry: Object) => void} options.onOpen
 * @param {(entry: Object) => string} options.titleOf
 */
export function renderSideBySide(members, { current, onOpen, titleOf }) {
  const columns = members.map(({ entry, record }) => renderMember(entry, record, entry === current, onOpen, titleOf));
  return el("div", { class: "side-by-side", tabindex: "0", role: "region", "aria-label": "Side by side" }, columns);
}

function renderMember(entry, record, isCurrent, onOpen, titleOf) {
  const advantage = meanAdvantage(record);
  const head = el(
    "div",
    { class: "member-head" },
    el("button", { class: "link-button", type: "button", onclick: () => onOpen(entry) }, titleOf(entry)),
    isCurrent && chip("open", "accent"),
  );
  const numbers = el(
    "dl",
    { class: "member-numbers" },
    pair("reward", num(entry.score)),
    advantage !== null && pair("advantage", signed(advantage), advantage < 0 ? "negative" : "positive"),
    pair("searches", num(entry.searches)),
    pair("tokens", num(entry.tokens)),
    pair("stop", String(entry.stop ?? "–")),
  );
  const answer = el("p", { class: "member-answer" }, entry.problem ? entry.problem : `→ ${entry.answer ?? "no answer"}`);
  const body = el("div", { class: "member-body" }, (record.segments ?? []).map(renderBrief));
  return el("section", { class: `member${isCurrent ? " is-current" : ""}` }, head, numbers, answer, body);
}

function pair(name, value, tone = null) {
  return el("div", {}, el("dt", {}, name), el("dd", { class: tone }, value));
}

function signed(value) {
  return value > 0 ? `+${num(value)}` : num(value);
}

/** A segment in few lines: what the policy said, or the titles of what was found. */
function renderBrief(segment) {
  const author = authorOf(segment);
  if (author !== "environment") {
    const brief = el("div", { class: `brief by-${author}` });
    for (const part of partsOf(segment.text)) {
      const text = segment.text.slice(part.start, part.end).replace(/<\/?[a-z_]+>/g, "").trim();
      append(brief, el("p", {}, el("span", { class: "part-label" }, part.label), " ", text));
    }
    return brief;
  }
  const passages = Array.isArray(segment.info?.passages) ? segment.info.passages : [];
  if (passages.length === 0) return el("div", { class: "brief by-environment" }, el("p", {}, segment.text.trim().slice(0, 300)));
  const titles = passages.map((passage) => el("li", {}, passage.gold && "★ ", String(passage.title || "untitled")));
  return el("div", { class: "brief by-environment" }, el("ol", {}, titles));
}
