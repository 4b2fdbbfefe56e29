// Light and dark: that of the system, unless the switch says otherwise.

import { el } from "./dom.js";

const THEMES = ["auto", "light", "dark"];
const KEY = "search-r1-theme";

/** The chosen theme. A browser may keep nothing for pages from a disk. */
function storedTheme() {
  try {
    return localStorage.getItem(KEY) ?? "auto";
  } catch {
    return "auto";
  }
}

function applyTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem(KEY, theme);
  } catch {
    // it is forgotten when the page is closed
  }
}

/** A switch between the themes, which also sets the one that was chosen last. */
export function themeSwitch() {
  const button = el("button", { class: "quiet-button", type: "button" });
  const show = (theme) => {
    applyTheme(theme);
    button.textContent = { auto: "◐ Auto", light: "○ Light", dark: "● Dark" }[theme];
    button.setAttribute("aria-label", `Colours: ${theme}. Change`);
  };
  button.addEventListener("click", () => {
    const place = THEMES.indexOf(document.documentElement.dataset.theme);
    show(THEMES[(place + 1) % THEMES.length]);
  });
  const stored = storedTheme();
  show(THEMES.includes(stored) ? stored : "auto");
  return button;
}
