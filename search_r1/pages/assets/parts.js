// What a turn of the policy is made of: thinking, calls of tools, an answer, and text beside these.

const LABELS = { think: "thinking", search: "query", answer: "answer" };

/**
 * @typedef {Object} Part
 * @property {string} kind  name of the tag, or "text"
 * @property {string} label
 * @property {number} start  first character in the text
 * @property {number} end
 */

/**
 * Divides a text into parts. A tag that is never closed reaches to the end.
 * @param {string} text
 * @returns {Part[]}
 */
export function partsOf(text) {
  const parts = [];
  const tagged = /<([a-z_]{2,20})>[\s\S]*?(?:<\/\1>|$)/g;
  let end = 0;
  for (const match of text.matchAll(tagged)) {
    if (match.index > end) parts.push(plain(text, end, match.index));
    end = match.index + match[0].length;
    const kind = match[1];
    parts.push({ kind, label: LABELS[kind] ?? kind.replaceAll("_", " "), start: match.index, end });
  }
  if (end < text.length || parts.length === 0) parts.push(plain(text, end, text.length));
  return merged(parts, text);
}

function plain(text, start, end) {
  return { kind: "text", label: "text", start, end };
}

/** White space between two parts belongs to the one before it. */
function merged(parts, text) {
  const kept = [];
  for (const part of parts) {
    const isBlank = part.kind === "text" && text.slice(part.start, part.end).trim() === "";
    if (isBlank && kept.length) kept[kept.length - 1].end = part.end;
    else kept.push({ ...part });
  }
  return kept;
}
