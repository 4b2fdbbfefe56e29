// A list of which only the rows in sight are in the page, so that its length costs nothing.

import { el } from "./dom.js";

const ROW_HEIGHT = 62;
const MORE_ROWS = 6;

/**
 * A list box.
 * @param {(entry: any) => Node[]} renderRow
 * @param {(entry: any) => void} onChoose
 */
export function virtualList(renderRow, onChoose) {
  const canvas = el("div", { class: "list-canvas", role: "presentation" });
  const box = el(
    "div",
    { class: "list", role: "listbox", tabindex: "0", "aria-label": "Trajectories" },
    canvas,
  );
  let items = [];
  let chosen = null;

  function draw() {
    const first = Math.max(0, Math.floor(box.scrollTop / ROW_HEIGHT) - MORE_ROWS);
    const last = Math.min(
      items.length,
      Math.ceil((box.scrollTop + box.clientHeight) / ROW_HEIGHT) + MORE_ROWS,
    );
    const rows = items.slice(first, last).map((entry, offset) => row(entry, first + offset));
    canvas.replaceChildren(...rows);
    const inSight = rows.find((node) => node.getAttribute("aria-selected") === "true");
    if (inSight) box.setAttribute("aria-activedescendant", inSight.id);
    else box.removeAttribute("aria-activedescendant");
  }

  function row(entry, place) {
    const node = el(
      "div",
      {
        class: "row",
        role: "option",
        id: `row-${place}`,
        "aria-selected": String(entry === chosen),
        "aria-setsize": items.length,
        "aria-posinset": place + 1,
        onclick: () => onChoose(entry),
      },
      ...renderRow(entry),
    );
    node.style.top = `${place * ROW_HEIGHT}px`;
    return node;
  }

  /** Brings the chosen row into sight: by a row at the edge, into the middle if it is far away. */
  function reveal() {
    const place = items.indexOf(chosen);
    if (place < 0) return;
    const top = place * ROW_HEIGHT;
    const lowest = top + ROW_HEIGHT - box.clientHeight;
    const isFar = top < box.scrollTop - ROW_HEIGHT || lowest > box.scrollTop + ROW_HEIGHT;
    if (isFar) box.scrollTop = top - box.clientHeight / 2;
    else box.scrollTop = Math.max(lowest, Math.min(top, box.scrollTop));
  }

  box.addEventListener("scroll", draw, { passive: true });
  new ResizeObserver(draw).observe(box);
  return {
    element: box,
    /** Shows these entries, from the top. */
    show(entries) {
      items = entries;
      canvas.style.height = `${items.length * ROW_HEIGHT}px`;
      box.scrollTop = 0;
      reveal();
      draw();
    },
    /** Marks an entry as chosen, and brings it into sight. */
    choose(entry) {
      chosen = entry;
      reveal();
      draw();
    },
  };
}
