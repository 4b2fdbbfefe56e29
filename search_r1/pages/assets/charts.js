// Charts: one metric each, a line for every run. uPlot (uplot.js) draws them.
/* global uPlot */

import { el, fill } from "./dom.js";
import { AXES, curveOf, figure, lastOf, smoothed } from "./series.js";

const HEIGHT = 190;
const COLOURS = 8;
/** Dashes tell runs apart where colours do not. Lengths of strokes and gaps, in pixels. */
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 2], [1, 4], [12, 6], [4, 2, 1, 2]];

/** The style of the run of a number: a colour of the page, and a dash. */
export function styleOf(number) {
  return { colour: `--run-${number % COLOURS}`, dash: DASHES[number % DASHES.length] };
}

/** What a colour of the page is at present; a canvas knows no variables. */
export function colourOf(variable) {
  const probe = el("span", { hidden: true });
  probe.style.color = `var(${variable})`;
  document.body.appendChild(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}

/** A piece of the line of a run, for its name. */
export function lineSample(number) {
  const { colour, dash } = styleOf(number);
  const canvas = el("canvas", { class: "line-sample", width: "48", height: "12", "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  context.strokeStyle = colourOf(colour);
  context.lineWidth = 2;
  context.setLineDash(dash);
  context.moveTo(0, 3);
  context.lineTo(24, 3);
  context.stroke();
  return canvas;
}

/**
 * A chart with its name and what it says at the cursor, or at the end. Arrow keys move the cursor.
 * @param {string} title
 * @param {string} detail
 */
export class Chart {
  constructor(title, detail = "") {
    this.plot = null;
    this.shape = "";
    this.canvas = el("div", { class: "canvas", "aria-hidden": "true" });
    this.readout = el("p", { class: "readout" });
    this.element = el(
      "figure",
      { class: "chart", tabindex: "0", role: "group", "aria-label": `${title}: arrow keys read values` },
      el("figcaption", {}, el("span", { class: "chart-title" }, title), detail && el("code", {}, detail)),
      this.canvas,
      this.readout,
    );
    this.element.dataset.chart = title;
    this.element.addEventListener("keydown", (event) => this.onKey(event));
    this.element.addEventListener("focus", () => this.readout.setAttribute("aria-live", "polite"));
    this.element.addEventListener("blur", () => this.readout.removeAttribute("aria-live"));
    new ResizeObserver(() => this.fit()).observe(this.canvas);
  }

  /**
   * Shows other data. A plot is made anew only if the shape of the data is another.
   * @param {Array<Array<number|null|undefined>>} data  as uPlot wants them, places first
   * @param {Object[]} series  of uPlot, without the first
   * @param {string} unit  of the places
   * @param {(index: number|null) => Node[]} read  what the chart says at a place, or at the end
   * @param {Object} [more]  options of uPlot
   */
  show(data, series, unit, read, more = {}) {
    const shape = JSON.stringify([series.map((one) => [one.label, one.dash, one.width]), unit]);
    const isZoomed = this.isZoomed();
    this.read = read;
    this.data = data;
    if (this.plot && shape === this.shape) {
      this.plot.setData(data, !isZoomed);
      if (isZoomed) this.plot.redraw();
    } else {
      this.make(data, series, unit, more);
    }
    this.shape = shape;
    this.say(null);
  }

  /** Whether less is shown than there is. */
  isZoomed() {
    if (!this.plot || this.data[0].length === 0) return false;
    const { min, max } = this.plot.scales.x;
    return min > this.data[0][0] || max < this.data[0][this.data[0].length - 1];
  }

  make(data, series, unit, more) {
    this.plot?.destroy();
    const axis = {
      stroke: () => colourOf("--soft"),
      grid: { stroke: () => colourOf("--line"), width: 1 },
      ticks: { stroke: () => colourOf("--line"), width: 1 },
      font: "12px system-ui, sans-serif",
    };
    this.plot = new uPlot(
      {
        width: Math.max(200, this.canvas.clientWidth),
        height: HEIGHT,
        legend: { show: false },
        cursor: { drag: { x: true, y: false }, points: { size: 6 } },
        scales: { x: { time: false } },
        axes: [
          { ...axis, size: 34, values: (plot, ticks) => ticks.map(figure), label: unit, labelSize: 16, labelGap: 0, labelFont: axis.font },
          { ...axis, size: 58, values: (plot, ticks) => ticks.map(figure) },
        ],
        series: [{}, ...series],
        hooks: { setCursor: [(plot) => this.say(plot.cursor.idx ?? null)] },
        ...more,
      },
      data,
      this.canvas,
    );
  }

  /** Says what the chart shows at a place, at its end without one. */
  say(index) {
    fill(this.readout, ...this.read(index));
  }

  onKey(event) {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape" && this.plot) this.plot.setCursor({ left: -10, top: -10 });
    if (!move || !this.plot || this.data[0].length === 0) return;
    const last = this.data[0].length - 1;
    const now = this.plot.cursor.idx ?? (move > 0 ? -1 : last + 1);
    const index = Math.max(0, Math.min(last, now + move));
    this.plot.setCursor({ left: this.plot.valToPos(this.data[0][index], "x"), top: HEIGHT / 3 });
    this.say(index);
    event.preventDefault();
  }

  /** Takes the width that there is. */
  fit() {
    const width = this.canvas.clientWidth;
    if (this.plot && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  /** Draws again, in other colours. */
  redraw() {
    this.plot?.redraw(false, true);
  }
}

/** The chart of a metric, with a line for each run. */
export class MetricChart extends Chart {
  constructor(title, metric) {
    super(title, metric);
    this.metric = metric;
  }

  /**
   * @param {Array<{name: string, number: number, rows: Object[]}>} runs  those that are shown
   * @param {{axis: string, smoothing: number}} view
   * @returns {boolean} whether any of them has the metric
   */
  update(runs, view) {
    const curves = runs
      .map((run) => ({ run, curve: curveOf(run.rows, this.metric, view.axis) }))
      .filter(({ curve }) => curve[0].length > 0);
    this.element.hidden = curves.length === 0;
    if (curves.length === 0) return false;
    const isSmooth = view.smoothing > 0;
    const tables = curves.flatMap(({ curve: [xs, ys] }) =>
      isSmooth ? [[xs, smoothed(ys, view.smoothing)], [xs, ys]] : [[xs, ys]],
    );
    const data = tables.length > 1 ? uPlot.join(tables) : tables[0];
    const series = curves.flatMap(({ run, curve }) => seriesOf(run, curve[0].length, isSmooth));
    const every = isSmooth ? 2 : 1;
    const read = (index) => this.values(curves, data, index, every, view);
    this.show(data, series, AXES[view.axis].unit, read);
    return true;
  }

  values(curves, data, index, every, view) {
    const unit = AXES[view.axis].unit;
    const at = index === null ? "newest" : `${unit} ${figure(data[0][index])}`;
    const values = curves.map(({ run }, number) => valueOf(run, data[1 + number * every], index));
    return [el("span", { class: "at" }, at), ...values];
  }
}

/** The value of a run at a place, at the end without one, beside a piece of its line. */
export function valueOf(run, column, index) {
  const value = index === null ? lastOf(column) : column[index];
  return el("span", { class: "value" }, lineSample(run.number), `${run.name} `, el("b", {}, figure(value)));
}

/** The line of a run, as uPlot draws it. */
export function lineOf(run) {
  const { colour, dash } = styleOf(run.number);
  return { label: run.name, stroke: () => colourOf(colour), width: 2, dash };
}

/** The line of a run in a chart of a metric; where lines are smoothed also the faint one of what was measured. */
function seriesOf(run, length, isSmooth) {
  const line = lineOf(run);
  line.points = { show: length < 40, size: 4, fill: line.stroke };
  if (!isSmooth) return [line];
  const faint = { ...line, label: `${run.name}, measured`, width: 0.5, alpha: 0.5, dash: [], points: { show: false } };
  return [line, faint];
}
