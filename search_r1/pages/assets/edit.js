// What was said or found is edited in a dialog; then the model goes on from there.

import { append, el, fill } from "./dom.js";

/**
 * A dialog that edits what the policy said.
 * @param {string} text
 * @param {(text: string) => void} onDone
 */
export function editText(text, onDone) {
  const area = el("textarea", { rows: "10", "aria-label": "What the policy says" });
  area.value = text;
  openDialog("Edit what the policy says", [area], () => onDone(area.value));
}

/**
 * A dialog that edits what a search found.
 * @param {string} query
 * @param {Array<{id?: string, title?: string, text?: string}>} passages
 * @param {(passages: Array<{id: string, title: string, text: string}>) => void} onDone
 */
export function editPassages(query, passages, onDone) {
  const list = el("div", { class: "edited-passages" });
  const rows = [];
  const add = (passage) => {
    const row = passageRow(passage, () => {
      rows.splice(rows.indexOf(row), 1);
      row.element.remove();
    });
    rows.push(row);
    append(list, row.element);
  };
  passages.forEach(add);
  const more = el("button", { type: "button", class: "quiet-button", onclick: () => add({}) }, "Add a passage");
  const content = [el("p", { class: "hint" }, "Passages for ", el("q", {}, query)), list, more];
  openDialog("Edit what the search finds", content, () => onDone(rows.map((row) => row.value())));
}

function passageRow(passage, onRemove) {
  const title = el("input", { type: "text", "aria-label": "Title" });
  const text = el("textarea", { rows: "3", "aria-label": "Text" });
  title.value = String(passage.title ?? "");
  text.value = String(passage.text ?? "");
  const remove = el("button", { type: "button", class: "quiet-button", onclick: onRemove }, "Remove");
  const element = el("fieldset", {}, el("legend", { class: "visually-hidden" }, "Passage"), title, text, remove);
  const value = () => ({ id: String(passage.id ?? ""), title: title.value, text: text.value });
  return { element, value };
}

function openDialog(title, content, onDone) {
  const dialog = el("dialog", { class: "edit", "aria-label": title });
  const close = () => {
    dialog.close();
    dialog.remove();
  };
  const done = () => {
    close();
    onDone();
  };
  fill(
    dialog,
    el("h2", {}, title),
    ...content,
    el(
      "div",
      { class: "dialog-actions" },
      el("button", { type: "button", class: "primary-button", onclick: done }, "Go on from here"),
      el("button", { type: "button", class: "quiet-button", onclick: close }, "Leave as it is"),
    ),
  );
  dialog.addEventListener("cancel", close);
  document.body.append(dialog);
  dialog.showModal();
}
