// Elements of the page. Text enters it by textContent alone, so no text can become an element.

/**
 * Makes an element. Keys of `props` that begin with "on" are listeners, `class` is the class name,
 * all others are attributes; null, undefined and false leave one out.
 * @param {string} tag
 * @param {Object<string, any>} [props]
 * @param {...(Node|string|number|null|undefined|false)} children
 * @returns {HTMLElement}
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "class") node.className = value;
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  append(node, ...children);
  return node;
}

/**
 * Appends nodes and texts; what is null, undefined or false is left out.
 * @param {Node} node
 * @param {...(Node|string|number|null|undefined|false)} children
 */
export function append(node, ...children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.appendChild(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

/** Replaces all that is in `node`. */
export function fill(node, ...children) {
  node.textContent = "";
  append(node, ...children);
}

/** A number for people: few digits, a real minus sign, a dash for none. */
export function num(value, digits = 3) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  const text = Number.isInteger(value) ? String(value) : value.toFixed(digits);
  return text.replace("-", "−");
}

/** A number with its noun: "1 hop", "2 hops". */
export function counted(number, one, many = `${one}s`) {
  return `${num(number)} ${number === 1 ? one : many}`;
}

/** A small label; `tone` chooses its colour: good, bad, quiet, accent. */
export function chip(text, tone = "quiet", title = null) {
  return el("span", { class: `chip ${tone}`, title }, text);
}
