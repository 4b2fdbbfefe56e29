// Which entries the list shows: pure functions of the index and of what was chosen.

/**
 * @typedef {Object} Entry  an entry of the index (search_r1/pages/records.py, summary_of)
 * @typedef {Object} Filters
 * @property {string} text
 * @property {string} kind
 * @property {string} step
 * @property {string} source
 * @property {string} stop
 * @property {string} hops
 * @property {string} searches
 * @property {string} detail  tokens, where the numbers of single tokens are known, or text
 * @property {string} reward  any, right, wrong, or between
 * @property {string} outcome  of the group: any, mixed, same
 * @property {string} group  a group, or empty
 */

export const NO_FILTERS = Object.freeze({
  text: "",
  kind: "",
  step: "",
  source: "",
  stop: "",
  hops: "",
  searches: "",
  detail: "",
  reward: "",
  outcome: "",
  group: "",
});
export const CHOICES = ["kind", "step", "source", "stop", "hops", "searches", "detail"];

/** The values of a property that occur, with how often, in their order. */
export function valuesOf(index, name) {
  const counts = new Map();
  for (const entry of index) {
    const value = entry[name];
    if (value === null || value === undefined) continue;
    counts.set(value, (counts.get(value) ?? 0) + 1);
  }
  return [...counts].sort(([a], [b]) => (typeof a === "number" ? a - b : String(a) < String(b) ? -1 : 1));
}

/** Whether an entry scored full marks: by exact match where that is known, else by its score. */
export function isRight(entry) {
  return (entry.em ?? entry.score ?? 0) >= 1;
}

/** Whether an entry scored something, but not full marks. */
export function isPartial(entry) {
  return !entry.problem && !isRight(entry) && (entry.score ?? 0) > 0;
}

/** By group: its entries. */
export function groupsOf(index) {
  const groups = new Map();
  for (const entry of index) {
    if (!entry.group) continue;
    if (!groups.has(entry.group)) groups.set(entry.group, []);
    groups.get(entry.group).push(entry);
  }
  return groups;
}

/** Whether the members of a group score differently, which is what a group learns from. */
export function isMixed(members) {
  return new Set(members.map((entry) => entry.score)).size > 1;
}

/** What of an entry is searched for a text without unpacking its record. */
function shortText(entry) {
  const parts = [entry.question, entry.answer, entry.problem, ...(entry.gold ?? []), ...(entry.queries ?? [])];
  return parts.filter(Boolean).join("\n").toLowerCase();
}

/**
 * Whether an entry is shown.
 * @param {Entry} entry
 * @param {Filters} filters
 * @param {Map<string, Entry[]>} groups
 * @param {Set<Entry>|null} everywhere  entries whose whole record holds the text, if that was asked
 */
export function matches(entry, filters, groups, everywhere) {
  for (const name of CHOICES) {
    if (filters[name] !== "" && String(entry[name]) !== filters[name]) return false;
  }
  if (filters.group && entry.group !== filters.group) return false;
  if (filters.reward && rewardClass(entry) !== filters.reward) return false;
  if (filters.outcome) {
    const mixed = entry.group && isMixed(groups.get(entry.group));
    if ((filters.outcome === "mixed") !== Boolean(mixed)) return false;
  }
  if (!filters.text) return true;
  if (everywhere) return everywhere.has(entry);
  return shortText(entry).includes(filters.text.toLowerCase());
}

function rewardClass(entry) {
  if (entry.problem) return "unreadable";
  if (isRight(entry)) return "right";
  return isPartial(entry) ? "between" : "wrong";
}

export const ORDERS = {
  written: null,
  "lowest reward": (a, b) => (a.score ?? 0) - (b.score ?? 0),
  "highest reward": (a, b) => (b.score ?? 0) - (a.score ?? 0),
  "most searches": (a, b) => (b.searches ?? 0) - (a.searches ?? 0),
  longest: (a, b) => (b.tokens ?? 0) - (a.tokens ?? 0),
};
