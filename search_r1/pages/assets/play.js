// The playground: a question goes to every model, and what happens to it is shown as it happens.

import { append, el, fill } from "./dom.js";
import { themeSwitch } from "./theme.js";
import { blockText } from "./data.js";
import { answerPattern } from "./passages.js";
import { renderInspector, renderPrompt, renderSegment, renderTrajectory } from "./trajectory.js";
import { postForEvents } from "./events.js";
import { editPassages, editText } from "./edit.js";

const POLL_MS = 1000;
const STATES = { loading: "loading …", ready: "ready", ended: "has ended: see the console" };

async function start() {
  const app = document.getElementById("app");
  const about = JSON.parse(await blockText("about"));
  const columns = about.models.map((name, number) => new Column(name, number));
  fill(
    app,
    el("header", { class: "top" }, el("h1", {}, "Playground"), themeSwitch()),
    el("main", { class: "play" }, renderForm(columns), el("div", { class: "models" }, ...columns.map((c) => c.element))),
  );
  document.documentElement.dataset.ready = "true";
  await followStates(columns);
}

/** Asks what the models do until all are ready or have ended. */
async function followStates(columns) {
  for (;;) {
    const answer = await fetch("models").catch(() => null);
    const states = answer?.ok ? await answer.json() : columns.map(() => ({ state: "ended" }));
    columns.forEach((column, number) => column.setState(states[number].state));
    if (states.every(({ state }) => state !== "loading")) return;
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

function renderForm(columns) {
  const question = el("textarea", { id: "question", rows: "2", required: true, placeholder: "Where does … live?" });
  const gold = el("input", { id: "gold", type: "text", placeholder: "optional; several with | between them" });
  const ask = () => {
    const golds = gold.value.split("|").map((text) => text.trim()).filter(Boolean);
    const text = question.value.trim();
    if (text) columns.forEach((column) => column.ask({ question: text, gold: golds, said: [], passages: {} }));
  };
  const form = el(
    "form",
    { class: "ask" },
    el("label", { for: "question" }, "Question"),
    question,
    el("label", { for: "gold" }, "Right answer"),
    gold,
    el("div", { class: "ask-actions" },
      el("button", { class: "primary-button", type: "submit" }, "Ask"),
      el("button", { class: "quiet-button", type: "button", onclick: () => columns.forEach((c) => c.stop()) }, "Stop"),
      el("span", { class: "hint" }, "Ctrl + Enter asks")),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
  });
  return form;
}

/** A model and the trajectory that it is writing. */
class Column {
  constructor(name, number) {
    this.number = number;
    this.state = el("span", { class: "model-state", role: "status" }, STATES.loading);
    this.content = el("div", { class: "model-content" });
    this.element = el(
      "section",
      { class: "model", "aria-label": name },
      el("header", { class: "model-head" }, el("h2", {}, name), this.state),
      this.content,
    );
  }

  setState(state) {
    this.state.textContent = STATES[state];
  }

  stop() {
    this.abort?.abort();
  }

  /** Asks the model, and shows what comes until the trajectory has ended. */
  async ask(body) {
    this.stop();
    const abort = new AbortController();
    this.abort = abort;
    const live = new Live(body.gold);
    fill(this.content, live.element);
    this.state.textContent = "writing …";
    try {
      for await (const event of postForEvents(`models/${this.number}/ask`, body, abort.signal)) {
        if (event.name === "ended") this.show(event.data.record, { ...body, follows: event.data.name });
        else live.take(event);
      }
      this.state.textContent = STATES.ready;
    } catch (error) {
      const text = abort.signal.aborted ? "stopped" : error.message;
      if (this.abort === abort) this.state.textContent = text;
      live.end(text);
    }
  }

  /** Shows a whole trajectory, whose parts can be edited. */
  show(record, body) {
    const actions = (segment, place) => this.actionsOn(record, body, segment, place);
    fill(this.content, renderTrajectory(record, { actions }));
  }

  actionsOn(record, body, segment, place) {
    const button = (onclick) => el("button", { class: "link-button", type: "button", onclick }, "Edit and go on");
    const before = record.segments.slice(0, place);
    const said = before.filter((other) => other.source === "model").map((other) => other.token_ids);
    if (segment.source === "model") {
      return button(() => editText(segment.text, (text) => this.ask({ ...body, said: [...said, text] })));
    }
    const { query, passages } = segment.info ?? {};
    if (query === undefined || !Array.isArray(passages)) return null;
    return button(() =>
      editPassages(String(query), passages, (edited) =>
        this.ask({ ...body, said, passages: { ...body.passages, [query]: edited } }),
      ),
    );
  }
}

/** A trajectory while it is written. */
class Live {
  constructor(gold) {
    this.pattern = answerPattern(gold);
    this.turns = el("div", { class: "turns" });
    this.typed = el("div", { class: "text" });
    this.typing = el(
      "section",
      { class: "segment by-policy typing", hidden: true },
      el("div", { class: "segment-head" }, el("span", { class: "author" }, "Policy")),
      this.typed,
    );
    this.element = el("article", { class: "trajectory" }, this.turns, this.typing);
  }

  take({ name, data }) {
    if (name === "began") append(this.turns, renderPrompt("Prompt", data.prompt));
    else if (name === "rewritten") append(this.turns, renderPrompt("Context written anew", data.prompt));
    else if (name === "sampled") this.type(data.text, data.goes_on);
    else if (name === "written") this.write(data.segment);
    else if (name === "failed") this.end(data.message);
  }

  type(text, goesOn) {
    this.typing.hidden = false;
    if (goesOn) this.typed.append(text);
    else this.typed.textContent = text;
  }

  write(segment) {
    if (segment.source === "model") this.typing.hidden = true;
    const painted = [];
    append(this.turns, renderSegment(segment, this.pattern, painted, renderInspector()));
    for (const { node, token } of painted) node.dataset.author = token.author;
  }

  end(text) {
    this.typing.hidden = true;
    append(this.turns, el("p", { class: "problem", role: "alert" }, text));
  }
}

start();
