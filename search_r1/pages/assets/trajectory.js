// One trajectory: its question and outcome, then what each author wrote, token by token.

import { append, chip, counted, el, fill, num } from "./dom.js";
import { partsOf } from "./parts.js";
import { answerPattern, renderPassages } from "./passages.js";
import { MEASURES, authorOf, measuresOf, renderFacts, renderLegend, scaleOf, tokensOf } from "./tokens.js";

const SHORT_PROMPT = 500;

/**
 * @typedef {Object} TrajectoryOptions
 * @property {string} [colour]  the measure that tokens are coloured by at first
 * @property {(name: string) => void} [onColour]  is told of another choice
 * @property {(segment: Object, place: number) => Node|null} [actions]  what can be done with a segment
 */

/**
 * The view of a record as search_r1/pages/records.py (view_of) gives it. It stands by itself: a page
 * only needs its styles (base.css, trajectory.css).
 * @param {Object} record
 * @param {TrajectoryOptions} [options]
 * @returns {HTMLElement}
 */
export function renderTrajectory(record, options = {}) {
  const pattern = answerPattern(record.gold ?? []);
  const painted = [];
  const inspector = renderInspector();
  const turns = el("div", { class: "turns" }, renderPrompt("Prompt", record.prompt));
  record.segments.forEach((segment, place) => {
    for (const rewrite of record.rewrites ?? []) {
      if (rewrite.at === place) append(turns, renderPrompt("Context written anew", rewrite.prompt));
    }
    append(turns, renderSegment(segment, pattern, painted, inspector, options.actions?.(segment, place)));
  });
  return el(
    "article",
    { class: "trajectory" },
    renderOutcome(record),
    renderColours(record, painted, options),
    turns,
    painted.length > 0 && inspector.element,
  );
}

/** Question, answer against gold, and every part of the reward. */
export function renderOutcome(record) {
  const reward = record.reward ?? {};
  const isScored = reward.score !== undefined;
  const isRight = (reward.em ?? reward.score ?? 0) >= 1;
  const parts = Object.entries(reward).filter(([name]) => name !== "score");
  return el(
    "header",
    { class: "outcome" },
    el("h2", {}, record.question || "A prompt without a question"),
    el(
      "dl",
      { class: "answers" },
      el("div", {}, el("dt", {}, "Answer"), el("dd", { class: isScored && (isRight ? "right" : "wrong") },
        isScored && el("span", { "aria-hidden": "true" }, isRight ? "✓ " : "✗ "),
        isScored && el("span", { class: "visually-hidden" }, isRight ? "right: " : "wrong: "),
        record.answer ?? "no answer")),
      el("div", {}, el("dt", {}, "Gold"), el("dd", {}, (record.gold ?? []).join("  ·  ") || "–")),
    ),
    el(
      "div",
      { class: "chips" },
      isScored && chip(`reward ${num(reward.score)}`, isRight ? "good" : "bad"),
      record.step !== null && record.step !== undefined && chip(`${record.kind} step ${record.step}`),
      chip(`stop: ${record.stop_reason || "unknown"}`),
      record.data_source && chip(String(record.data_source)),
      typeof record.info?.searches === "number" && chip(counted(record.info.searches, "search", "searches")),
      typeof record.info?.hops === "number" && chip(counted(record.info.hops, "hop")),
      record.uid && chip(`group ${String(record.uid).slice(0, 8)}`, "quiet", String(record.uid)),
      record.rewrites?.length && chip(`${record.rewrites.length + 1} contexts`),
    ),
    parts.length > 0 && el(
      "dl",
      { class: "reward-parts", "aria-label": "Parts of the reward" },
      ...parts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, num(value)))),
    ),
  );
}

/** The choice of a measure and its legend; a change paints the tokens anew. */
function renderColours(record, painted, options) {
  const known = measuresOf(record.segments);
  const tokens = record.segments.flatMap(tokensOf);
  const legend = el("div", { class: "legend-place" });
  const select = el(
    "select",
    { class: "colour-by" },
    ...known.map((name) => el("option", { value: name }, MEASURES[name].label)),
  );
  const paint = () => {
    const scale = scaleOf(select.value, tokens);
    for (const { node, token } of painted) scale.paint(node, token);
    fill(legend, renderLegend(scale));
  };
  select.value = known.includes(options.colour) ? options.colour : "author";
  select.addEventListener("change", () => {
    paint();
    options.onColour?.(select.value);
  });
  queueMicrotask(paint); // the tokens are made after this
  const hint = known.length > 1
    ? null
    : el("span", { class: "hint" }, "This record says nothing of single tokens (trainer.trajectory_records).");
  return el("div", { class: "colours" }, el("label", {}, "Colour by ", select), legend, hint);
}

/** A prompt, closed where it is long. */
export function renderPrompt(title, text) {
  const isShort = String(text).length <= SHORT_PROMPT;
  return el(
    "section",
    { class: "segment by-prompt", "data-author": "prompt" },
    el("details", { open: isShort }, el("summary", {}, el("span", { class: "author" }, title),
      el("span", { class: "segment-facts" }, `${String(text).length} characters`)),
      el("div", { class: "text" }, String(text))),
  );
}

/**
 * What one author wrote. `painted` gets the nodes of its tokens, `inspector` shows their numbers.
 * @param {Object} segment
 * @param {RegExp|null} pattern  finds the gold answers
 * @param {Array<{node: HTMLElement, token: Object}>} painted
 * @param {{follow: Function}} inspector
 * @param {Node|null} [actions]
 */
export function renderSegment(segment, pattern, painted, inspector, actions = null) {
  const author = authorOf(segment);
  const section = el("section", { class: `segment by-${author}` }, renderSegmentHead(segment, author, actions));
  if (author === "environment") append(section, renderObservation(segment, pattern, painted, inspector));
  else append(section, renderSaid(segment, painted, inspector));
  return section;
}

function renderSegmentHead(segment, author, actions) {
  const info = segment.info ?? {};
  const names = { policy: "Policy", untrained: "Policy, not trained", engine: "Engine", environment: "Environment" };
  const facts = [
    info.turn !== undefined && `turn ${info.turn}`,
    info.kind && String(info.kind).replaceAll("_", " "),
    segment.is_aside && "beside the conversation",
    segment.policy_version >= 0 && `version ${segment.policy_version}`,
    segment.reward && `paid ${Number(segment.reward.toPrecision(3))}`,
    segment.token_ids?.length && counted(segment.token_ids.length, "token"),
    info.finish_reason === "length" && "cut at the limit of tokens",
    info.cut === true && "cut to fit",
    typeof info.latency_s === "number" && `${Math.round(info.latency_s * 1000)} ms`,
  ].filter(Boolean);
  return el(
    "div",
    { class: "segment-head" },
    el("span", { class: "author" }, names[author]),
    el("span", { class: "segment-facts" }, facts.join(" · ")),
    actions,
  );
}

/** What the policy or the engine wrote, in its parts. */
function renderSaid(segment, painted, inspector) {
  const tokens = tokensOf(segment);
  const said = el("div", { class: "said" });
  if (tokens.length) inspector.follow(said, segment.text);
  for (const part of partsOf(segment.text)) {
    const text = el("div", { class: "text" });
    appendTokens(text, segment, tokens, part, painted);
    append(said, el("div", { class: `part part-${part.kind}` }, el("span", { class: "part-label" }, part.label), text));
  }
  return said;
}

/** Appends the tokens that begin in a part; where tokens are not known, its text as one. */
function appendTokens(node, segment, tokens, part, painted) {
  if (tokens.length === 0) {
    const whole = el("span", { class: "tok" }, segment.text.slice(part.start, part.end));
    whole.dataset.author = authorOf(segment);
    append(node, whole);
    return;
  }
  const isLast = part.end === segment.text.length;
  for (const token of tokens) {
    if (token.start < part.start || (token.start >= part.end && !(isLast && token.start === part.end))) continue;
    const isPartial = token.start === token.end;
    const text = isPartial ? "▫" : segment.text.slice(token.start, token.end);
    const span = el("span", { class: isPartial ? "tok partial" : "tok" }, text);
    span.token = token;
    painted.push({ node: span, token });
    append(node, span);
  }
}

function renderObservation(segment, pattern, painted, inspector) {
  const info = segment.info ?? {};
  const passages = Array.isArray(info.passages) ? info.passages : [];
  const plain = () => {
    const text = el("div", { class: "text" });
    const tokens = tokensOf(segment);
    if (tokens.length) inspector.follow(text, segment.text);
    appendTokens(text, segment, tokens, { start: 0, end: segment.text.length }, painted);
    return text;
  };
  if (passages.length === 0) return plain();
  return [
    info.query !== undefined && el("p", { class: "query" }, "Passages for ", el("q", {}, String(info.query))),
    renderPassages(passages, pattern),
    el("details", { class: "as-written" }, el("summary", {}, "As the policy read it"), plain()),
  ];
}

/** A bar with the numbers of the token under the pointer, or of the one that arrow keys reach. */
export function renderInspector() {
  const element = el("div", { class: "inspector", role: "status", "aria-label": "Token" });
  const hint = "Point at a token, or focus a turn and press ← →, to see its numbers.";
  fill(element, el("span", { class: "hint" }, hint));
  let current = null;

  function show(span, text) {
    current?.classList.remove("current");
    current = span;
    span.classList.add("current");
    fill(element, renderFacts(span.token, text));
  }

  function follow(container, text) {
    container.tabIndex = 0;
    container.setAttribute("role", "group");
    container.setAttribute("aria-label", "Tokens of a turn; arrow keys go from one to the next");
    container.addEventListener("pointerover", (event) => {
      if (event.target.token) show(event.target, text);
    });
    container.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      const spans = [...container.querySelectorAll(".tok")];
      const next = Math.min(spans.length - 1, Math.max(0, spans.indexOf(current) + move));
      show(spans[next], text);
      spans[next].scrollIntoView({ block: "nearest" });
      event.preventDefault();
    });
  }
  return { element, follow };
}
