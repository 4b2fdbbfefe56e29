// Tokens of a trajectory: who wrote each, its numbers, and how a number becomes a colour.

import { append, el, num } from "./dom.js";

export const AUTHORS = {
  policy: "policy, trained",
  untrained: "policy, not trained",
  engine: "engine (not sampled)",
  environment: "environment",
  prompt: "prompt",
};

/**
 * @typedef {Object} Token
 * @property {number} start  first character in the text of its segment
 * @property {number} end
 * @property {number} id
 * @property {string} author  a key of AUTHORS
 * @property {Object<string, number|null>} facts  by the name of a measure
 */

/**
 * What tokens can be coloured by. `of` gives the number of a token; "high" is hot where it is
 * large, "low" where it is small, "signed" has two colours, "class" one for each value.
 */
export const MEASURES = {
  author: { label: "author", kind: "author" },
  mask: { label: "mask", kind: "class", of: (facts) => facts.mask },
  rollout_log_probs: { label: "rollout log-prob", kind: "low", of: (facts) => facts.rollout_log_probs },
  log_probs: { label: "trainer log-prob", kind: "low", of: (facts) => facts.log_probs },
  ref_log_probs: { label: "reference log-prob", kind: "low", of: (facts) => facts.ref_log_probs },
  gap: { label: "gap (trainer − rollout)", kind: "signed", of: gapOf },
  entropy: { label: "entropy", kind: "high", of: (facts) => facts.entropy },
  advantages: { label: "advantage", kind: "signed", of: (facts) => facts.advantages },
  values: { label: "value", kind: "signed", of: (facts) => facts.values },
  version: { label: "policy version", kind: "class", of: (facts) => facts.version },
};
const FACTS = ["mask", "rollout_log_probs", "log_probs", "ref_log_probs", "entropy", "advantages", "values"];

function gapOf(facts) {
  const { log_probs: trainer, rollout_log_probs: rollout } = facts;
  return isNumber(trainer) && isNumber(rollout) ? trainer - rollout : null;
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/** Who wrote a segment, as far as that is the same for all of its tokens. */
export function authorOf(segment) {
  if (segment.source === "observation") return "environment";
  if (segment.source === "forced") return "engine";
  const mask = segment.mask;
  return Array.isArray(mask) && mask.length && !mask.some(Boolean) ? "untrained" : "policy";
}

/**
 * The tokens of a segment; none where the record does not say where they end.
 * @returns {Token[]}
 */
export function tokensOf(segment) {
  const ends = segment.token_ends;
  if (!Array.isArray(ends) || !Array.isArray(segment.token_ids)) return [];
  const at = placesOf(segment.text);
  const whole = authorOf(segment);
  let start = 0;
  return segment.token_ids.map((id, place) => {
    const end = Math.max(start, at(ends[place] ?? 0));
    const facts = { version: segment.policy_version >= 0 ? segment.policy_version : null };
    for (const name of FACTS) {
      if (Array.isArray(segment[name])) facts[name] = segment[name][place] ?? null;
    }
    const author = whole === "policy" && facts.mask === 0 ? "untrained" : whole;
    const token = { start, end, id, author, facts };
    start = end;
    return token;
  });
}

/** From places in characters, which records count in, to places in a JavaScript string. */
function placesOf(text) {
  if (!/[\ud800-\udbff]/.test(text)) return (place) => Math.min(place, text.length);
  const places = [0];
  for (const character of text) places.push(places[places.length - 1] + character.length);
  return (place) => places[Math.min(place, places.length - 1)];
}

/** The measures for which a record has numbers. */
export function measuresOf(segments) {
  const tokens = segments.flatMap(tokensOf);
  return Object.keys(MEASURES).filter(
    (name) => name === "author" || tokens.some((token) => isNumber(MEASURES[name].of(token.facts))),
  );
}

/**
 * How a measure becomes colours in one record.
 * @param {string} name
 * @param {Token[]} tokens  all of the record
 */
export function scaleOf(name, tokens) {
  const measure = MEASURES[name];
  if (measure.kind === "author") return { name, measure, paint: paintAuthor };
  const numbers = tokens.map((token) => measure.of(token.facts)).filter(isNumber);
  if (measure.kind === "class") {
    const classes = [...new Set(numbers)].sort((a, b) => a - b);
    const paint = (node, token) => paintClass(node, classes.indexOf(measure.of(token.facts)));
    return { name, measure, classes, paint };
  }
  const most = Math.max(1e-6, ...numbers.map(Math.abs));
  const paint = (node, token) => paintNumber(node, measure.of(token.facts), measure.kind, most);
  return { name, measure, most, paint };
}

function unpaint(node) {
  delete node.dataset.author;
  delete node.dataset.heat;
  delete node.dataset.class;
}

function paintAuthor(node, token) {
  unpaint(node);
  node.dataset.author = token.author;
}

function paintClass(node, place) {
  unpaint(node);
  if (place >= 0) node.dataset.class = String(place % 6);
}

function paintNumber(node, value, kind, most) {
  unpaint(node);
  if (!isNumber(value)) return;
  const isCold = kind === "signed" && value < 0;
  node.dataset.heat = isCold ? "cold" : "hot";
  node.style.setProperty("--weight", `${Math.round((100 * Math.abs(value)) / most)}%`);
}

/** What the colours mean. */
export function renderLegend(scale) {
  const legend = el("div", { class: "legend", "aria-label": "What the colours mean" });
  const { measure } = scale;
  if (measure.kind === "author") {
    for (const [name, label] of Object.entries(AUTHORS)) {
      append(legend, el("span", { class: "key" }, swatch({ author: name }), label));
    }
  } else if (measure.kind === "class") {
    scale.classes.slice(0, 12).forEach((value, place) => {
      const label = scale.name === "mask" ? ["left out of the loss", "in the loss"][value] : `version ${value}`;
      append(legend, el("span", { class: "key" }, swatch({ class: String(place % 6) }), label));
    });
  } else {
    const ends = measure.kind === "signed" ? [-scale.most, 0, scale.most] : [0, measure.kind === "low" ? -scale.most : scale.most];
    append(legend, ends.map((end, place) => [num(end), place < ends.length - 1 && bar(measure.kind, place)]));
  }
  return legend;
}

function swatch(data) {
  const node = el("span", { class: "swatch tok", "aria-hidden": "true" }, "ab");
  Object.assign(node.dataset, data);
  return node;
}

function bar(kind, place) {
  const isCold = kind === "signed" && place === 0;
  return el("span", { class: `scale ${isCold ? "cold" : "hot"}`, "aria-hidden": "true" });
}

/** All that is known of a token, as a list of names and numbers. */
export function renderFacts(token, text) {
  const rows = [
    ["token", JSON.stringify(text.slice(token.start, token.end))],
    ["id", String(token.id)],
    ["author", AUTHORS[token.author]],
  ];
  for (const [name, measure] of Object.entries(MEASURES)) {
    if (!measure.of) continue;
    const value = measure.of(token.facts);
    if (name === "mask" && isNumber(value)) rows.push(["mask", value ? "1, in the loss" : "0, left out"]);
    else if (isNumber(value)) rows.push([measure.label, num(value, 4)]);
  }
  return el(
    "dl",
    { class: "facts" },
    ...rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
  );
}
