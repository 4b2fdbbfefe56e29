// Where the time of a step goes: the timers of a run, one upon the other.

import { el } from "./dom.js";
import { AXES, duration, figure, alongAxis } from "./series.js";
import { Chart, colourOf } from "./charts.js";

const PREFIX = "timing_s/";
const WHOLE = "timing_s/step";
const MOST = 7;

/** The timers that take most time, then one for all others and for what no timer measures. */
export function stackOf(rows) {
  const steps = rows.filter((row) => typeof row[WHOLE] === "number");
  const sums = new Map();
  for (const row of steps) {
    for (const [name, value] of Object.entries(row)) {
      if (name.startsWith(PREFIX) && name !== WHOLE) sums.set(name, (sums.get(name) ?? 0) + (value ?? 0));
    }
  }
  const names = [...sums.keys()].sort((a, b) => sums.get(b) - sums.get(a)).slice(0, MOST);
  const layers = names.map((name) => ({
    name: name.slice(PREFIX.length),
    values: steps.map((row) => row[name] ?? 0),
  }));
  const known = steps.map((row, place) => layers.reduce((sum, layer) => sum + layer.values[place], 0));
  layers.push({ name: "other", values: steps.map((row, place) => Math.max(0, row[WHOLE] - known[place])) });
  return { steps, layers };
}

/** The stacked timers of one run. */
export class TimerChart extends Chart {
  constructor(name) {
    super(`Seconds of a step: ${name}`, `${PREFIX}*`);
  }

  update(rows, axis) {
    const { steps, layers } = stackOf(rows);
    this.element.hidden = steps.length === 0;
    if (steps.length === 0) return;
    const places = alongAxis(rows, axis).filter((_, number) => typeof rows[number][WHOLE] === "number");
    const sums = [];
    layers.forEach((layer, number) => {
      sums.push(layer.values.map((value, place) => value + (number ? sums[number - 1][place] : 0)));
    });
    // the highest first, so that each lower one covers its part of it
    const data = [places, ...sums.toReversed()];
    const series = layers.toReversed().map((layer, place) => {
      const colour = `--layer-${layers.length - 1 - place}`;
      const paint = () => colourOf(colour);
      return { label: layer.name, stroke: paint, fill: paint, width: 1, points: { show: false } };
    });
    const read = (index) => this.values(layers, steps, places, index, axis);
    this.show(data, series, AXES[axis].unit, read, { scales: { x: { time: false }, y: { range: fromZero } } });
  }

  values(layers, steps, places, index, axis) {
    const place = index ?? steps.length - 1;
    const at = index === null ? "newest" : `${AXES[axis].unit} ${figure(places[place])}`;
    const values = layers.map((layer, number) => {
      const swatch = el("span", { class: "layer-sample", "aria-hidden": "true" });
      swatch.style.background = `var(--layer-${number})`;
      return el("span", { class: "value" }, swatch, `${layer.name} `, el("b", {}, duration(layer.values[place])));
    });
    return [el("span", { class: "at" }, at), ...values];
  }
}

function fromZero(plot, low, high) {
  return [0, high > 0 ? high * 1.05 : 1];
}
