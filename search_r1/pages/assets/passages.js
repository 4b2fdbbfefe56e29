// What a search has found: a card for each passage, gold and answers marked.

import { append, chip, el, num } from "./dom.js";

/** An expression that finds the gold answers as whole words, however they are spaced; or null. */
export function answerPattern(golds) {
  const texts = golds
    .map((gold) => String(gold).match(/[\p{L}\p{N}]+/gu)?.map(escaped).join("[^\\p{L}\\p{N}]+"))
    .filter(Boolean);
  if (texts.length === 0) return null;
  texts.sort((a, b) => b.length - a.length);
  return new RegExp(`(?<![\\p{L}\\p{N}])(?:${texts.join("|")})(?![\\p{L}\\p{N}])`, "giu");
}

function escaped(text) {
  return text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
}

/** Appends `text` to `node`, with every place that `pattern` finds in a <mark>. */
export function appendMarked(node, text, pattern) {
  let end = 0;
  for (const match of pattern ? text.matchAll(pattern) : []) {
    append(node, text.slice(end, match.index), el("mark", { title: "gold answer" }, match[0]));
    end = match.index + match[0].length;
  }
  append(node, text.slice(end));
  return node;
}

/**
 * The passages of an observation as a list of cards.
 * @param {Array<{id?: string, title?: string, text?: string, score?: number, gold?: boolean}>} passages
 * @param {RegExp|null} pattern
 */
export function renderPassages(passages, pattern) {
  return el(
    "ol",
    { class: "passages" },
    ...passages.map((passage, place) => {
      const text = String(passage.text ?? "");
      const holdsAnswer = pattern !== null && text.search(pattern) >= 0;
      return el(
        "li",
        { class: `passage${passage.gold ? " is-gold" : ""}` },
        el(
          "div",
          { class: "passage-head" },
          el("span", { class: "rank" }, `${place + 1}`),
          appendMarked(el("span", { class: "passage-title" }), String(passage.title || "untitled"), pattern),
          passage.gold && chip("★ gold passage", "gold"),
          holdsAnswer && chip("holds the answer", "accent"),
          el(
            "span",
            { class: "passage-facts" },
            passage.id !== undefined && `id ${passage.id}`,
            typeof passage.score === "number" && ` · score ${num(passage.score)}`,
          ),
        ),
        appendMarked(el("p", { class: "passage-text" }), text, pattern),
      );
    }),
  );
}
